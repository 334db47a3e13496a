"""The command line: LightningCLI for training, and the tools around it."""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence

import lightning.pytorch as pl
from jsonargparse import auto_cli
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_iet.data
import lightning_iet.modules
from lightning_iet import __version__
from lightning_iet.callbacks import AntiGradientControl, Evaluation, ParameterAveragingCallback, RunProgressBar
from lightning_iet.data import ShardedDataModule
from lightning_iet.tools.compare import compare
from lightning_iet.tools.sample import sample
from lightning_iet.utilities.errors import one_line_errors

__all__ = ["TOOLS", "IETCLI", "main"]

PROGRAM = "lightning-iet"

TOOLS: dict[str, Callable[..., object]] = {"compare": compare, "sample": sample}

DESCRIPTION = f"""Train diffusion models that do not memorise their training images, and prove it (version {__version__}).

  {PROGRAM} fit --config configs/digits/iet_agc.yaml      train, evaluate, write a run folder
  {PROGRAM} compare runs/digits/baseline runs/digits/iet_agc
  {PROGRAM} sample --ckpt runs/.../last.ckpt --num 64 --out images

Tools beside the subcommands below, each with a --help of its own: {", ".join(TOOLS)}.
"""


class IETCLI(LightningCLI):
    """LightningCLI with one group of options for each method; its neutral value switches the method off."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--agc.*``, ``--averaging.*`` and ``--evaluation.*``: flat keys, also for sweeps."""
        parser.add_lightning_class_args(AntiGradientControl, "agc")
        parser.add_lightning_class_args(ParameterAveragingCallback, "averaging")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.set_defaults({"agc.threshold": 0.0, "averaging.num_shards": 1})

    def instantiate_classes(self) -> None:
        """Split the training data into as many shards as are averaged."""
        super().instantiate_classes()
        averaging = next(c for c in self.trainer.callbacks if isinstance(c, ParameterAveragingCallback))
        shards = self.trainer.world_size if averaging.num_shards is None else averaging.num_shards
        if self.datamodule is not None and shards > 1:
            self.datamodule = ShardedDataModule(self.datamodule, num_shards=shards)


def main(args: Sequence[str] | None = None) -> None:
    """Run the program.

    Args:
        args: Command-line arguments; ``None`` = those of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    _quiet()
    with one_line_errors(PROGRAM):
        if arguments and arguments[0] in TOOLS:
            auto_cli(TOOLS[arguments[0]], args=arguments[1:], prog=f"{PROGRAM} {arguments[0]}", as_positional=True)
        else:
            IETCLI(
                pl.LightningModule,
                pl.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                trainer_defaults={"callbacks": [RunProgressBar()], "logger": _LOGGER},
                parser_kwargs={"prog": PROGRAM, "description": DESCRIPTION, "version": __version__},
                save_config_kwargs={"overwrite": True},  # a logger without versions: the newest run's file stays
                args=None if args is None else arguments,
            )


_LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "run"}}


def _quiet() -> None:
    """Silence what Lightning and torch tell their own developers."""
    logging.getLogger("lightning.pytorch").addFilter(lambda record: "Tip:" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
