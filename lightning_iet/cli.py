"""The command line: LightningCLI for training, and the tools around it."""

import argparse
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_iet import __version__
from lightning_iet.callbacks import AntiGradientControl, Evaluation, ParameterAveragingCallback, RunProgressBar
from lightning_iet.callbacks.interruptions import Resumption, StopSignal
from lightning_iet.data import ShardedDataModule
from lightning_iet.functional.sharding import Partition
from lightning_iet.tools.audit import audit
from lightning_iet.tools.audit_model import audit_model
from lightning_iet.tools.compare import compare
from lightning_iet.tools.export import export
from lightning_iet.tools.plan import PlanningTrainer
from lightning_iet.tools.sample import sample
from lightning_iet.tools.sweep import sweep
from lightning_iet.utilities.checkpoints import check_whole, last_checkpoint, outline, use_atomic_checkpoints
from lightning_iet.utilities.errors import TRACEBACK_VARIABLE, fail, one_line_errors
from lightning_iet.utilities.files import check_writable, run_folder
from lightning_iet.utilities.lightning import find_callback

PROGRAM = "lightning-iet"

_BOOLEANS = ("true", "false", "yes", "no")
_WORDS = ("best", "last", "hpc", "registry")  # of Lightning's own, in the place of a checkpoint's path

TOOLS: dict[str, Callable[..., object]] = {
    tool.__name__.replace("_", "-"): tool for tool in (audit, audit_model, compare, export, sample, sweep)
}
"""The commands beside those of the trainer, by name."""

DESCRIPTION = f"""\
Train diffusion models that do not memorise their training images, and prove it.

  {PROGRAM} fit --config configs/digits/iet_agc.yaml   train, evaluate, write a run folder
  {PROGRAM} fit --config ... --ckpt_path last             go on with a run that was cut off, or start it
  {PROGRAM} plan --config ... --measure_steps 5        what it will cost: steps, memory, time
  {PROGRAM} compare RUN RUN ... --out comparison       one table over runs, and a picture
  {PROGRAM} sweep configs/sweeps/agc_threshold.yaml --jobs 2
  {PROGRAM} sample --ckpt CHECKPOINT --num 64 --out images
  {PROGRAM} export --ckpt CHECKPOINT --out DIR         a folder that diffusers loads, with a model card
  {PROGRAM} audit --generated DIR --train DIR --out audit   does any generator copy its training images?
  {PROGRAM} audit-model --ckpt CHECKPOINT --train DIR --held-out DIR --out audit   does this model, and does its
                                                       loss tell its training images from others?

`audit`, `audit-model`, `compare`, `export`, `sample` and `sweep` are tools beside the subcommands
below; each has a --help of its own.
Methods are groups of options of `fit`: --agc.*, --averaging.*, --evaluation.*;
--agc.threshold 0 and --averaging.num_shards 1 switch them off.
Set {TRACEBACK_VARIABLE}=1 to see the traceback of an error.
"""


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description as they are written."""


class IETCLI(LightningCLI):
    """LightningCLI with one group of options for each method; its neutral value switches the method off."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--agc.*``, ``--averaging.*`` and ``--evaluation.*``: flat keys, also for sweeps."""
        parser.add_lightning_class_args(AntiGradientControl, "agc")
        parser.add_lightning_class_args(ParameterAveragingCallback, "averaging")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.set_defaults({"agc.threshold": 0.0, "averaging.num_shards": 1})
        parser.add_argument("--sharding.partition", type=Partition, default="stratified", help="by class, or iid")
        parser.add_argument("--sharding.seed", type=int, default=0, help="seed of the split into shards")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """What a trainer does; images are drawn with `sample` rather than `predict`."""
        own = {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}
        return own | {"plan": {"model", "datamodule"}}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Look at the checkpoint that a run is to go on from before anything is built."""
        super().parse_arguments(parser, args)
        options = self.config[self.config.subcommand]
        data, model = (options.get(f"{name}.init_args") or {} for name in ("data", "model"))
        if data.get("synthetic") and "synthetic" in model:  # a run without the data is one without the weights, too
            model["synthetic"] = True
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and path not in _WORDS:
            check_whole(Path(path), argument="ckpt_path")
            outline(Path(path), argument="ckpt_path")

    def before_fit(self) -> None:
        """Find where a run goes on, and whether its folder can be written: now, not after hours of training."""
        use_atomic_checkpoints(self.trainer)
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning would write last.ckpt all the same
            for checkpointing in self.trainer.checkpoint_callbacks:
                checkpointing.save_last = False  # type: ignore[attr-defined]
        self.trainer.callbacks.append(StopSignal())  # type: ignore[attr-defined]  # after all that belongs to a step
        options = self.config_init[self.subcommand]
        if options["ckpt_path"] == "last":
            options["ckpt_path"] = last_checkpoint(self.trainer)
        if options["ckpt_path"] not in _WORDS:
            self.trainer.callbacks.insert(0, Resumption(options["ckpt_path"]))  # type: ignore[attr-defined]
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            remedy = "Give another one as `save_dir` of the logger, or with `--trainer.default_root_dir`."
            check_writable(run_folder(self.trainer), argument="save_dir", remedy=remedy, make=False)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Leave our progress bar out where none is wanted; Lightning refuses both together."""
        if self._get(self.config_init, "trainer.enable_progress_bar") is False:
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": []}
        return super().instantiate_trainer(**kwargs)

    def instantiate_classes(self) -> None:
        """Split the training data into as many shards as are averaged."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if error.__cause__ is None or "of the Union subtypes" not in str(error):
                raise
            raise error.__cause__ from None  # what a class has to say, without all that jsonargparse tried
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


class _Parser(LightningArgumentParser):
    """Says what is wrong in one line, instead of printing all options before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with status 2."""
        if os.environ.get(TRACEBACK_VARIABLE) and ex is not None:
            raise ex
        fail(PROGRAM, message)


class _ToolParser(_Parser):
    """Shows options with dashes, though they are named after the arguments of a function."""

    def format_help(self) -> str:
        """Return the help."""
        text = super().format_help().replace("<class 'Path'>", "Path")
        return re.sub(r"--\w+", lambda option: option[0].replace("_", "-"), text)


def main(args: Sequence[str] | None = None) -> None:
    """Run the program.

    Args:
        args: Command-line arguments; ``None`` = those of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    _quiet()
    with one_line_errors(PROGRAM):
        tool = TOOLS.get(arguments[0].replace("_", "-")) if arguments else None
        if tool is not None:
            run_tool(tool, arguments[1:])
        else:
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
                parser_kwargs={
                    "prog": PROGRAM,
                    "description": DESCRIPTION,
                    "version": __version__,
                    "formatter_class": _Help,
                },
                save_config_kwargs={"overwrite": True},  # a logger without versions: the newest run's file stays
                args=None if args is None else arguments,
            )


def run_tool(tool: Callable[..., object], args: Sequence[str]) -> None:
    """Run a function as a command: a sequence as positional arguments, everything else as options.

    Options are written with dashes or with underscores, and a switch alone means true: ``--held-out DIR --strict``.

    Args:
        tool: The function; its docstring and type hints are the command's help.
        args: Command-line arguments after the command's name.
    """
    name = tool.__name__.replace("_", "-")
    parser = _ToolParser(prog=f"{PROGRAM} {name}", description=_first_paragraphs(tool), formatter_class=_Help)
    parameters = inspect.signature(tool).parameters
    positional = {name for name, parameter in parameters.items() if parameter.annotation == Sequence[Path]}
    for name in positional:
        parser.add_argument(name, nargs="+", type=Path, metavar=name.upper(), help="folders, see above")
    parser.add_function_arguments(tool, skip=positional, as_group=False)
    tool(**parser.parse_args(_spelled_out(args, parser.get_defaults().as_dict())).as_dict())


def _spelled_out(args: Sequence[str], defaults: Mapping[str, object]) -> list[str]:
    """Write options as the parser knows them.

    Example:
        >>> _spelled_out(["--held-out", "a-b", "--strict", "--k=5"], {"strict": False})
        ['--held_out', 'a-b', '--strict', 'true', '--k=5']
    """
    found: list[str] = []
    for position, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            found.append(argument)
            continue
        key = name[2:].replace("-", "_")
        found.append(f"--{key}{equals}{value}")
        alone = not equals and "".join(args[position + 1 : position + 2]).lower() not in _BOOLEANS
        if alone and isinstance(defaults.get(key), bool):
            found.append("true")
    return found


def _first_paragraphs(tool: Callable[..., object]) -> str:
    """A docstring up to its list of arguments."""
    return (inspect.getdoc(tool) or "").partition("\nArgs:")[0].replace("``", "")


_LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "run"}}


def _quiet() -> None:
    """Silence what Lightning, jsonargparse and torch tell their own developers."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip" not in record.getMessage()
    )
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*sync_dist=True.*",
        ".*The dirpath has changed.*",
        ".*not resumable.*",
        ".*across ranks is zero.*",  # nothing is held out
    ):
        warnings.filterwarnings("ignore", message=message)
