"""LightningCLI with the options of the methods: ``fit``, ``validate``, ``test`` and ``plan``."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import yaml
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
from lightning_iet.utilities.errors import yaml_fault
from lightning_iet.utilities.files import check_writable, run_folder
from lightning_iet.utilities.lightning import find_callback, order_callbacks

_WORDS = ("best", "last", "hpc", "registry")  # of Lightning's own, in the place of a checkpoint's path
_LOGGER_EXTRAS = ("tensorboard",)
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
        parser.add_argument(
            "--trust_checkpoint", type=bool, default=False, help="read a ckpt_path of your own that may run code"
        )
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
        trusted, path = options.get("trust_checkpoint"), options.get("ckpt_path")
        if trusted:
            options["weights_only"] = False
        if path and path not in _WORDS:
            outline(Path(path), argument="ckpt_path", trusted=trusted)

    def _parse_ckpt_path(self) -> None:
        """Take hyperparameters over from a checkpoint only where LightningCLI has put them there.

        Others, which a module has made itself, are no options of the command line, and Lightning would fail on them.
        """
        options = self.config[self.config.subcommand]
        path, trusted = options.get("ckpt_path"), options.get("trust_checkpoint")
        if path and path not in _WORDS and not trusted:
            saved = outline(Path(path), argument="ckpt_path").get("hyper_parameters", {})
            if "_class_path" in saved:
                super()._parse_ckpt_path()

    def before_fit(self) -> None:
        """Find where a run resumes, and check that its folder can be written, before hours of training."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning would write last.ckpt all the same
            for checkpointing in self.trainer.checkpoint_callbacks:
                checkpointing.save_last = False  # type: ignore[attr-defined]
        order_callbacks(self.trainer, StopSignal())
        options = self.config_init[self.subcommand]
        options["ckpt_path"] = resume_from(self.trainer, options["ckpt_path"], trusted=options["trust_checkpoint"])
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
        except (ValueError, ImportError) as error:
            _name_extra(error)
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


def _name_extra(error: BaseException | None) -> None:
    """Say which extra of this package brings the logger's package that an error says is missing.

    Raises:
        ModuleNotFoundError: If the error, or what caused it, says so.
    """
    while error is not None:
        for extra in _LOGGER_EXTRAS:
            if isinstance(error, ImportError) and extra in str(error):
                raise ModuleNotFoundError(
                    f"`{extra}` is not installed. Run: pip install 'lightning-iet[{extra}]'", name=extra
                ) from error
        error = error.__cause__ or error.__context__


class _Parser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with errors in one line."""


def run_trainer(args: Sequence[str] | None) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``plan``.

    Args:
        args: Command-line arguments, the command among them; ``None`` = those of the process.
    """
    given = sys.argv[1:] if args is None else list(args)
    _check_configurations(given)
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
        args=_with_flags(given),
    )


def _check_configurations(args: Sequence[str]) -> None:
    """Refuse a configuration that is no YAML by its name, which the parser's own message leaves out.

    Raises:
        ValueError: Naming file, line and column.
    """
    for argument in args:
        path = Path(argument.partition("=")[2] if argument.startswith("-") else argument)
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            continue
        try:
            yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"Argument `config` expected YAML, but got '{path}': {yaml_fault(error)}.") from error


def _with_flags(args: Sequence[str]) -> list[str]:
    """Write the one switch of these commands as the parser knows it.

    Example:
        >>> _with_flags(["fit", "--trust-checkpoint", "--ckpt_path", "last"])
        ['fit', '--trust_checkpoint=true', '--ckpt_path', 'last']
    """
    switch = "--trust_checkpoint"
    named = [re.sub("^--trust-checkpoint(?=$|=)", switch, argument) for argument in args]
    followed = [*named[1:], ""]
    return [
        f"{switch}=true" if argument == switch and after.lower() not in ("true", "false") else argument
        for argument, after in zip(named, followed, strict=True)
    ]
