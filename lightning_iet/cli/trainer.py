"""LightningCLI with the options of the methods: ``fit``, ``validate``, ``test`` and ``plan``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_iet import callbacks, data, modules
from lightning_iet.callbacks import (
    AntiGradientControl,
    Evaluation,
    ParameterAveragingCallback,
    ParameterSelection,
    Redistribution,
    RunProgressBar,
    ThresholdAwareAugmentation,
)
from lightning_iet.callbacks.interruptions import StopSignal, resume_from
from lightning_iet.cli import PROGRAM
from lightning_iet.cli.tools import HelpFormatter, OneLineErrors
from lightning_iet.data import ShardedDataModule
from lightning_iet.functional.sharding import Partition
from lightning_iet.tools.plan import PlanningTrainer
from lightning_iet.utilities.checkpoints import outline
from lightning_iet.utilities.configurations import find_configuration
from lightning_iet.utilities.files import check_writable, run_folder
from lightning_iet.utilities.lightning import find_callback, order_callbacks

_WORDS = ("best", "last", "hpc", "registry")  # of Lightning's own, in the place of a checkpoint's path
_LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "run"}}


class IETCLI(LightningCLI):
    """LightningCLI with one group of options for each method; its neutral value switches the method off."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add a group of options for each method, such as ``--agc.*``: flat keys, also for sweeps."""
        parser.add_lightning_class_args(AntiGradientControl, "agc")
        parser.add_lightning_class_args(ParameterAveragingCallback, "averaging")
        parser.add_lightning_class_args(ParameterSelection, "selection")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(Redistribution, "redistribution")
        parser.add_lightning_class_args(ThresholdAwareAugmentation, "augmentation")
        parser.set_defaults({"agc.threshold": 0.0, "averaging.num_shards": 1})
        parser.set_defaults({"redistribution.fraction": 0.0, "augmentation.max_magnitude": 0})
        parser.add_argument("--sharding.partition", type=Partition, default="stratified", help="by class, or iid")
        parser.add_argument("--sharding.seed", type=int, default=0, help="seed of the split into shards")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands of a trainer; `sample` takes the place of `predict`."""
        own = {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}
        return own | {"plan": {"model", "datamodule"}}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Find configurations by name, and check the checkpoint that a run resumes from before anything is built."""
        arguments = sys.argv[1:] if args is None else args
        self.config = parser.parse_args(with_configurations(cast("Sequence[str]", arguments)))
        options = self.config[self.config.subcommand]
        data, model = (options.get(f"{name}.init_args") or {} for name in ("data", "model"))
        if data.get("synthetic") and "synthetic" in model:  # a run without the data is one without the weights, too
            model["synthetic"] = True
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and path not in _WORDS:
            outline(Path(path), argument="ckpt_path")

    def before_fit(self) -> None:
        """Find where a run resumes, and check that its folder can be written, before hours of training."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning would write last.ckpt all the same
            for checkpointing in self.trainer.checkpoint_callbacks:
                checkpointing.save_last = False  # type: ignore[attr-defined]
        order_callbacks(self.trainer, StopSignal())
        options = self.config_init[self.subcommand]
        options["ckpt_path"] = resume_from(self.trainer, options["ckpt_path"])
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            remedy = "Give another one as `save_dir` of the logger, or with `--trainer.default_root_dir`."
            check_writable(run_folder(self.trainer), argument="save_dir", remedy=remedy, make=False)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Leave our progress bar out where none is wanted; Lightning refuses both together."""
        if self._get(self.config_init, "trainer.enable_progress_bar") is False:
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": []}
        return super().instantiate_trainer(**kwargs)

    def instantiate_classes(self) -> None:
        """Build trainer, model and data, and split the training data into the shards that are averaged."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if error.__cause__ is None or "of the Union subtypes" not in str(error):
                raise
            raise error.__cause__ from None  # what a class has to say, without all that jsonargparse tried
        # First, for callbacks of a configuration may copy the module in `setup`.
        self.trainer.callbacks.sort(key=lambda callback: not isinstance(callback, ParameterSelection))  # type: ignore[attr-defined]
        averaging = find_callback(self.trainer, ParameterAveragingCallback)
        assert averaging is not None  # noqa: S101 (a group of options)
        shards = self.trainer.world_size if averaging.num_shards is None else averaging.num_shards
        if self.datamodule is not None and shards > 1 and not isinstance(self.datamodule, ShardedDataModule):
            self.datamodule = ShardedDataModule(
                self.datamodule,
                num_shards=shards,
                partition=self._get(self.config, "sharding.partition"),
                seed=self._get(self.config, "sharding.seed"),
            )


def with_configurations(arguments: Sequence[str]) -> list[str]:
    """Write the paths of configurations in the place of their names.

    Example:
        >>> with_configurations(["fit", "--config", "digits/iet", "--trainer.max_epochs=1"])
        ['fit', '--config', '...iet.yaml', '--trainer.max_epochs=1']
    """
    found: list[str] = []
    for argument in arguments:
        if found and found[-1] in ("-c", "--config"):
            argument = str(find_configuration(argument))
        elif argument.startswith("--config="):
            argument = f"--config={find_configuration(argument.removeprefix('--config='))}"
        found.append(argument)
    return found


class _Parser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with errors in one line."""


def run_trainer(args: Sequence[str] | None) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``plan``.

    Args:
        args: Command-line arguments, the command among them; ``None`` = those of the process.
    """
    for package in (callbacks, data, modules):  # configurations may name a class that is imported without its module
        for name in package.__all__:
            getattr(package, name)
    IETCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        trainer_class=PlanningTrainer,
        trainer_defaults={"callbacks": [RunProgressBar()], "logger": _LOGGER},
        parser_class=_Parser,
        parser_kwargs={"prog": PROGRAM, "formatter_class": HelpFormatter},
        save_config_kwargs={"overwrite": True},  # a logger without versions: the newest run's file stays
        args=None if args is None else list(args),
    )
