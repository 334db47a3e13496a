"""The command line: a static list of commands, each of which imports only what it uses."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import cast

from lightning_iet import __version__
from lightning_iet.utilities.errors import TRACEBACK_VARIABLE, one_line_errors
from lightning_iet.utilities.text import write_plain_text

PROGRAM = "lightning-iet"

COMMANDS = {
    "train": {
        "demo": "train one small model plainly and one protected, side by side; show what each copies (3 minutes)",
        "inspect": "look at training images: near-duplicates, outliers, and which method suits them",
        "fit": "train a model, evaluate it, write a run folder; --ckpt_path last resumes a run, or starts it",
        "validate": "measure the loss of a checkpoint on the validation images",
        "test": "measure the loss of a checkpoint on the test images",
        "plan": "say what `fit` with the same options will cost: steps, memory, time",
        "configs": "list the configurations that come with the package, and copy one to edit",
        "sample": "sample images from a checkpoint",
        "export": "write a checkpoint as a folder that diffusers loads, with a model card",
    },
    "audit": {
        "audit": "find copies of training images among the images of any generator",
        "audit-model": "sample from a model and audit its images; test its loss for membership inference",
    },
    "search": {
        "compare": "write one table and one plot over several runs",
        "memcontrol": "search which part of a model to fine-tune, so that it memorises little",
        "sweep": "run the points of a sweep's file on this machine",
    },
}
"""What each command does, by group."""

OF_THE_TRAINER = ("fit", "validate", "test", "plan")
"""The commands that LightningCLI runs; each other one is a function of its name in ``lightning_iet.tools``."""

_OTHER_COMMANDS = {
    "evaluate": "test",
    "generate": "sample",
    "generation": "sample",
    "inference": "sample",
    "predict": "sample",
    "resume": "fit",
    "train": "fit",
    "training": "fit",
}
"""What commands are called elsewhere, and here."""

_EXAMPLES = f"""\
examples
  {PROGRAM} demo
  {PROGRAM} inspect --train FOLDER --image-size 64
  {PROGRAM} fit --images FOLDER
  {PROGRAM} fit --config digits/iet_agc --agc.threshold 0.5
  {PROGRAM} plan --config digits/iet_agc --measure_steps 5
  {PROGRAM} sample runs/digits/iet_agc --num-samples 64 --out images
  {PROGRAM} audit --generated FOLDER --train FOLDER --held-out FOLDER --out audit
  {PROGRAM} compare runs/digits/iet_agc runs/digits/baseline
  {PROGRAM} memcontrol --config FINE_TUNING.yaml --max-steps 600 --trials 20 --out search
  {PROGRAM} sweep sweeps/agc_threshold --jobs 2

{PROGRAM} COMMAND --help lists the options of a command. Methods are groups of options of `fit`: --agc.*,
--averaging.*, --selection.*, --redistribution.*, --augmentation.*, --evaluation.*; --agc.threshold 0,
--averaging.num_shards 1, --selection.family all, --redistribution.fraction 0 and --augmentation.max_magnitude 0, the
defaults, switch them off.
Set {TRACEBACK_VARIABLE}=1 to see the traceback of an error.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the program.

    Args:
        args: Command-line arguments; ``None`` = those of the process.

    Raises:
        SystemExit: With status 2 and one line on standard error for bad input; with status 0 after help.
    """
    write_plain_text(sys.stdout, sys.stderr)
    arguments = list(sys.argv[1:] if args is None else args)
    command = arguments[0].replace("_", "-") if arguments else ""
    known = [name for group in COMMANDS.values() for name in group]
    if not command:
        print(help_text(), file=sys.stderr)
        sys.exit(2)
    if command in ("-h", "--help", "help"):
        print(help_text())
        sys.exit(0)
    if command == "--version":
        print(PROGRAM, __version__)
        sys.exit(0)
    with one_line_errors(PROGRAM):
        from lightning_iet.cli.arguments import check_source, options_named, with_run, with_underscores

        _silence_advice()
        if command in OF_THE_TRAINER or (command.startswith("-") and not {*OF_THE_TRAINER}.isdisjoint(arguments)):
            with options_named(lambda name, _: f"--{name}"):
                completed = with_run(with_underscores(arguments))
                check_source(completed)
            from lightning_iet.cli.trainer import run_trainer

            run_trainer(completed)
        elif command in known:
            from lightning_iet.cli.tools import run_tool

            run_tool(tool(command), arguments[1:])
        elif command.startswith("-"):
            raise ValueError(
                f"Expected a command first, but got '{arguments[0]}', as in `{PROGRAM} fit {arguments[0]} …`."
            )
        else:
            close = [_OTHER_COMMANDS[command]] if command in _OTHER_COMMANDS else get_close_matches(command, known, n=1)
            print("\n".join(_commands()), file=sys.stderr)
            raise ValueError(f"There is no command '{command}'.{f' Did you mean {close[0]}?' if close else ''}")


def tool(command: str) -> Callable[..., object]:
    """Return the function behind a command that is none of the trainer's.

    Example:
        >>> tool("audit-model").__module__
        'lightning_iet.tools.audit_model'
    """
    name = command.replace("-", "_")
    return cast("Callable[..., object]", getattr(import_module(f"lightning_iet.tools.{name}"), name))


def help_text() -> str:
    """Return the list of commands with one line for each, and examples."""
    lines = ["Find out what a diffusion model has memorised, and train it so that it memorises less.", ""]
    lines += [f"usage: {PROGRAM} [-h] [--version] COMMAND [options]", ""]
    return "\n".join([*lines, *_commands(), _EXAMPLES.rstrip()])


def _commands() -> Iterator[str]:
    """Yield a line for each command, by group."""
    for group, commands in COMMANDS.items():
        yield from (group, *(f"  {name:<12} {text}" for name, text in commands.items()), "")


def _silence_advice() -> None:
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
