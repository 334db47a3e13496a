"""LightningCLI with the options of the methods: ``fit``, ``validate``, ``test`` and ``plan``."""

import argparse
import inspect
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from pydoc import locate
from typing import Any, ClassVar, cast

import diffusers
import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers.csv_logs import CSVLogger, ExperimentWriter
from lightning.pytorch.utilities import rank_zero_info

from lightning_iet import callbacks, data, modules
from lightning_iet.callbacks import (
    AntiGradientControl,
    Evaluation,
    ParameterAveragingCallback,
    ParameterSelection,
    Redistribution,
    ThresholdAwareAugmentation,
)
from lightning_iet.callbacks.interruptions import FinalCheckpoint, StopSignal, resume_from
from lightning_iet.callbacks.progress import ParameterSummary, RunProgressBar
from lightning_iet.cli import PROGRAM
from lightning_iet.cli.arguments import arguments_of, option_of_owner, options_named, with_configurations
from lightning_iet.cli.help import (
    HelpFormatter,
    OneLineErrors,
    check_dashes,
    explain_error,
    first_sentence,
    option_lines,
    plain,
    width,
    without_values,
    wrapped,
)
from lightning_iet.cli.images import measured_step, seconds_of_sampling, seconds_of_step, with_images
from lightning_iet.data import ShardedDataModule
from lightning_iet.functional.sharding import Partition, num_replicas
from lightning_iet.tools.plan import PlanningTrainer, in_mib, model_size, schedule_of
from lightning_iet.utilities.checkpoints import newest_checkpoint, outline
from lightning_iet.utilities.configurations import import_exports, leave_weights_out
from lightning_iet.utilities.devices import training_threads
from lightning_iet.utilities.errors import own_cause, yaml_fault
from lightning_iet.utilities.files import check_writable, checkpoint_of, run_folder
from lightning_iet.utilities.lightning import find_callback, num_shards_of, order_callbacks
from lightning_iet.utilities.text import counted, in_words

METHODS = {
    "agc": AntiGradientControl,
    "averaging": ParameterAveragingCallback,
    "redistribution": Redistribution,
    "augmentation": ThresholdAwareAugmentation,
    "selection": ParameterSelection,
    "evaluation": Evaluation,
}
"""The methods, by the group of their options."""

_PARTS: dict[type, str] = {
    **{kind: group for group, kind in METHODS.items()},
    ShardedDataModule: "sharding",  # which the command line puts around the data
    pl.LightningDataModule: "data",
    pl.LightningModule: "model",
}
"""The prefix of options, by the class whose arguments they are."""
_OF_SHARDING = {
    "datamodule": "--data",
    "num_shards": "--averaging.num_shards",
    "partition": "--sharding.partition",
    "seed": "--sharding.seed",
}
"""What the command line gives ShardedDataModule, by its arguments."""
_ARGUMENT_OPTIONS = {"datamodule": "--data", "model": "--model", "save_dir": "--trainer.logger.save_dir"}
"""What arguments of functions are as options."""
_SHOWN_FIRST = ("config", "ckpt_path", "trust_checkpoint", "measure_steps", "seed_everything")
_OFTEN = (
    "max_epochs", "max_steps", "accelerator", "devices", "precision", "gradient_clip_val", "accumulate_grad_batches",
    "check_val_every_n_epoch", "fast_dev_run", "default_root_dir", "logger", "enable_progress_bar",
)  # fmt: skip
_TEXTS = {
    "config": f"A configuration: a file, or a name that `{PROGRAM} configs` lists. May be given again; later ones win.",
    "ckpt_path": "A checkpoint; `last` goes on with an interrupted run, or starts it where there is none.",
    "seed_everything": "Seed of weights, order of samples and noise.",
    "trainer.fast_dev_run": "Run so many batches as a test, and keep nothing.",
    "trainer.logger": "Where measures go.",
}
_DESCRIPTIONS = {
    "fit": "Train a model, evaluate it, and write a run folder.",
    "validate": "Measure the loss of a checkpoint on the validation images, and evaluate it.",
    "test": "Measure the loss of a checkpoint on the test images, and evaluate it.",
    "plan": "Say what fit with the same options will cost: steps, memory, time.",
}
_DEEPER = ("--images", "--model.optimizer.init_args.lr", "--trainer.logger.save_dir")
"""Options that no parser lists by itself."""
_LIGHTNING_CHECKPOINTS = ("best", "last", "hpc", "registry")  # of Lightning's own, in the place of a checkpoint's path
_ACCELERATORS: dict[str, Callable[[], bool]] = {
    "cpu": lambda: True,
    "cuda": torch.cuda.is_available,
    "mps": torch.backends.mps.is_available,
}
_NO_SUCH_DEVICE = (  # what Lightning says of it
    "invalid accelerator name",
    "can not run on your system",
    "No supported gpu backend",
    "is not a valid input using",
    "selected with `CPUAccelerator` should be",
    "GPUs requested but none are available",
    "You requested gpu: ",
)
_NEEDS_GPU = "requires a GPU accelerator"  # what it says of a strategy
_LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "run"}}


class IETCLI(LightningCLI):
    """LightningCLI with one group of options for each method; its neutral value switches the method off."""

    images: str | None = None
    """What was found of ``--images``."""
    new_folders: Sequence[Path] = ()
    """Folders that this run makes: its own, and those above it."""
    threads = 0
    """Threads of torch before anything of the configuration was imported."""

    def __init__(self, *args: Any, command: str | None = None, **kwargs: Any) -> None:
        self.command = command
        super().__init__(*args, **kwargs)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Give commands other than the one that runs a parser without options: making those takes most of the time."""
        if self.command in (None, subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add a group of options for each method, such as ``--agc.*``: flat keys, also for sweeps."""
        for group, kind in METHODS.items():
            parser.add_lightning_class_args(kind, group)
        parser.set_defaults({"agc.threshold": 0.0, "averaging.num_shards": 1})
        parser.set_defaults({"redistribution.fraction": 0.0, "augmentation.max_magnitude": 0})
        parser.add_argument("--sharding.partition", type=Partition, default="stratified", help="By class, or iid.")
        parser.add_argument(
            "--trust_checkpoint", type=bool, default=False, help="Read a ckpt_path of your own that may run code."
        )
        parser.add_argument("--sharding.seed", type=int, default=0, help="Seed of the split into shards.")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands of a trainer; `sample` takes the place of `predict`."""
        own = {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}
        return own | {"plan": {"model", "datamodule"}}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Find configurations by name, and check the checkpoint that a run resumes from before anything is built."""
        self.threads = torch.get_num_threads()
        check_dashes(cast("Sequence[str]", args), cast("_Parser", parser).likely_options())
        arguments, self.images = with_images(with_configurations(cast("Sequence[str]", args)), measure=measured_step)
        self.config = self._parsed(parser, arguments)
        options = self.config[self.config.subcommand]
        _name_projects(options.get("trainer.logger"))
        data, model = (options.get(f"{name}.init_args") or {} for name in ("data", "model"))
        is_ours = (options.get("model.class_path") or "").startswith("lightning_iet.")  # others may load weights
        leave_weights_out(model, data)
        trusted, path = options.get("trust_checkpoint"), options.get("ckpt_path")
        if trusted:
            options["weights_only"] = False
        if not path and self.config.subcommand in ("test", "validate") and is_ours and not model.get("pretrained"):
            raise ValueError(
                f"`{self.config.subcommand}` expected a trained model, but got none: --ckpt_path RUN_FOLDER."
            )
        if path and path not in _LIGHTNING_CHECKPOINTS:
            path = options["ckpt_path"] = str(checkpoint_of(Path(path), argument="ckpt_path"))
            outline(Path(path), argument="ckpt_path", trusted=trusted)

    def _parsed(self, parser: LightningArgumentParser, arguments: list[str]) -> Namespace:
        """Parse a command by its own parser; that of the program would fill in and look up every option once more.

        It alone prints a configuration.
        """
        if self.command is None or any(argument.startswith("--print_config") for argument in arguments):
            return parser.parse_args(arguments)
        options = self._subcommand_parsers[self.command].parse_args(arguments[1:])
        return Namespace({"subcommand": self.command, self.command: options})

    def _parse_ckpt_path(self) -> None:
        """Take hyperparameters over from a checkpoint only where LightningCLI has put them there.

        Others, which a module has made itself, are no options of the command line, and Lightning would fail on them.
        """
        options = self.config[self.config.subcommand]
        path, trusted = options.get("ckpt_path"), options.get("trust_checkpoint")
        if path and path not in _LIGHTNING_CHECKPOINTS and not trusted:
            saved = outline(Path(path), argument="ckpt_path").get("hyper_parameters", {})
            if "_class_path" in saved:
                super()._parse_ckpt_path()

    def before_fit(self) -> None:
        """Find where a run resumes, and check that its folder can be written, before hours of training."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning would write last.ckpt all the same
            for checkpointing in self.trainer.checkpoint_callbacks:
                checkpointing.save_last = False  # type: ignore[attr-defined]
        order_callbacks(self.trainer, StopSignal(), *([FinalCheckpoint()] if self.trainer.checkpoint_callbacks else []))
        options = self.config_init[self.subcommand]
        options["ckpt_path"] = resume_from(self.trainer, options["ckpt_path"], trusted=options["trust_checkpoint"])
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            remedy = "Give another folder: --trainer.logger.save_dir, or --trainer.default_root_dir without a logger."
            folder = run_folder(self.trainer)
            check_writable(folder, argument="save_dir", remedy=remedy, make=False)
            self.new_folders = [place for place in (folder, *folder.parents) if not place.exists()]
        for logger in self._loggers_of_files() if options["ckpt_path"] else ():
            logger._experiment = _Metrics(logger.log_dir, "metrics.csv")
        if self.images is not None:
            done = _steps_done(options["ckpt_path"], trusted=options["trust_checkpoint"])
            rank_zero_info(f"{self.images}; {self._estimate(done)}")

    def before_test(self) -> None:
        """Find the newest checkpoint where it is asked for, and leave what training has written as it is."""
        options = self.config_init[self.subcommand]
        if options["ckpt_path"] == "last":
            found = newest_checkpoint(self.trainer)
            if found is None:
                raise ValueError(
                    f"`{self.subcommand}` expected a trained model, but got --ckpt_path last, and "
                    f"'{run_folder(self.trainer)}' and its earlier versions hold no checkpoint: --ckpt_path RUN_FOLDER."
                )
            options["ckpt_path"] = str(found)
        for logger in self._loggers_of_files():
            logger._experiment = _Metrics(logger.log_dir, f"{self.subcommand}.csv")

    before_validate = before_test

    def _loggers_of_files(self) -> list[CSVLogger]:
        """Return the loggers that would remove the ``metrics.csv`` of a run: a version with a name has one folder."""
        loggers = [logger for logger in self.trainer.loggers if isinstance(logger, CSVLogger)]
        is_first = self.trainer.is_global_zero
        return [logger for logger in loggers if is_first and (Path(logger.log_dir) / "metrics.csv").is_file()]

    def before_plan(self) -> None:
        """Say what was found of the images."""
        if self.images is not None:
            rank_zero_info(self.images)

    def _estimate(self, done: int) -> str:
        """Say on how many images without near-duplicates a run trains, how large it is, and how long it takes here."""
        batch_size = self._get(self.config, "data.init_args.batch_size")
        step = seconds_of_step(self.model, batch_size, self.trainer.strategy.root_device)
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        schedule = schedule_of(self.trainer, self.datamodule)
        seconds = max((schedule.process_steps or 0) - done, 0) * step
        what = "left to train" if done else "of training"
        length = f"about {in_words(seconds)} {what} here" if schedule.process_steps else "without an end"
        evaluation = find_callback(self.trainer, Evaluation)
        is_test = self.trainer.fast_dev_run  # type: ignore[attr-defined]  # which samples a few
        if schedule.process_steps and evaluation is not None and evaluation.num_samples and not is_test:
            images, calls = evaluation.num_samples, evaluation.num_inference_steps
            scale = getattr(self.model, "guidance_scale", 1)
            judging = seconds_of_sampling(step, batch_size, images, calls, scale) / self.trainer.world_size
            often = " each time" if evaluation.every_n_epochs or evaluation.every_n_steps else ""
            length += f", and {in_words(judging)} to sample the {images:,} images that it is judged by{often}"
        size = model_size(self.model)
        checkpoint = in_mib(size.checkpoint(len(schedule.shard_sizes)))
        data = getattr(self.datamodule, "datamodule", self.datamodule)
        found = getattr(data, "duplicate_groups", None)
        left = f"{sum(schedule.shard_sizes):,} images without near-duplicates; " if found and found.members else ""
        return f"{left}{size.trained / 1e6:.1f} M parameters, {checkpoint} a checkpoint, {length}"

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command; a run that fails before its first step leaves nothing behind."""
        try:
            with self._threads(subcommand):
                super()._run_subcommand(subcommand)
        except Exception:
            if subcommand == "fit" and self.trainer.is_global_zero and not self.trainer.global_step:
                _remove(self.new_folders)
            raise

    @contextmanager
    def _threads(self, subcommand: str) -> Iterator[None]:
        """Train a small network on one thread; measure and plan it likewise.

        Lightning divides the cores among processes that it starts, and what a configuration has set stays.
        """
        if self.trainer.world_size > 1 or torch.get_num_threads() != self.threads:
            yield
            return
        data = getattr(self.datamodule, "datamodule", self.datamodule)
        device = self.trainer.strategy.root_device
        with training_threads(self.model, getattr(data, "batch_size", None), device) as chosen:
            if chosen is not None and subcommand == "fit":
                rank_zero_info(
                    f"Training on {chosen} thread: a step is too small to be divided among {self.threads} "
                    f"(OMP_NUM_THREADS={self.threads} divides it)."
                )
            yield

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Leave our progress bar out where none is wanted; Lightning refuses both together."""
        if self._get(self.config_init, "trainer.enable_progress_bar") is False:
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": [ParameterSummary()]}
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            here = ", ".join(name for name, is_here in _ACCELERATORS.items() if is_here())
            if _NEEDS_GPU in str(error):
                on, strategy = (self._get(self.config_init, f"trainer.{name}") for name in ("accelerator", "strategy"))
                raise ValueError(
                    f"Option --trainer.strategy expected one that runs without a GPU with accelerator '{on}' (this "
                    f"machine has {here}), but got '{strategy}'."
                ) from error
            if not any(words in str(error) for words in _NO_SUCH_DEVICE):
                raise
            asked = [str(self._get(self.config_init, f"trainer.{name}")) for name in ("accelerator", "devices")]
            raise ValueError(
                f"Options --trainer.accelerator and --trainer.devices expected what this machine has ({here}), but got "
                f"'{asked[0]}' and '{asked[1]}'. Leave both out to take what is there."
            ) from error

    def instantiate_classes(self) -> None:
        """Build trainer, model and data, and split the training data into the shards that are averaged."""
        try:
            super().instantiate_classes()
        except (ValueError, ImportError) as error:
            _name_extra(error)
            if "of the Union subtypes" not in str(error):
                raise
            if (cause := own_cause(error)) is not None:
                raise cause from None  # what a class of ours has to say, without all that jsonargparse tried
            tried, inner = str(error), error.__cause__
            while inner is not None:
                tried, inner = str(inner) if "of the Union subtypes" in str(inner) else tried, inner.__cause__
            raise ValueError(without_values(tried)) from None
        # First, for callbacks of a configuration may copy the module in `setup`.
        self.trainer.callbacks.sort(key=lambda callback: not isinstance(callback, ParameterSelection))  # type: ignore[attr-defined]
        averaging = find_callback(self.trainer, ParameterAveragingCallback)
        assert averaging is not None  # noqa: S101 (a group of options)
        shards = num_shards_of(self.trainer, averaging)
        processes, cores = self.trainer.num_devices, os.cpu_count() or 1
        if self.trainer.strategy.root_device.type == "cpu" and processes > cores:
            rank_zero_info(
                f"{processes} processes (--trainer.devices) share the {counted(cores, 'core')} of this machine."
            )
        if self.subcommand in ("fit", "plan"):  # the others train no shards
            num_replicas(shards, self.trainer.world_size)  # before any process is started
        if self.datamodule is not None and shards > 1 and not isinstance(self.datamodule, ShardedDataModule):
            self.datamodule = ShardedDataModule(
                self.datamodule,
                num_shards=shards,
                partition=self._get(self.config, "sharding.partition"),
                seed=self._get(self.config, "sharding.seed"),
            )


def _steps_done(ckpt_path: str | Path | None, *, trusted: bool) -> int:
    """Return the optimizer steps of a process that a checkpoint holds; 0 where none is named by its path."""
    if ckpt_path is None or str(ckpt_path) in _LIGHTNING_CHECKPOINTS:
        return 0
    return int(outline(Path(ckpt_path), argument="ckpt_path", trusted=trusted).get("global_step", 0))


def _name_projects(loggers: Any) -> None:
    """Give runs of Weights & Biases our project where none is named; Lightning's own is lightning_logs."""
    for logger in loggers if isinstance(loggers, list | tuple) else [loggers]:
        if "WandbLogger" in str(getattr(logger, "class_path", "")) and "WANDB_PROJECT" not in os.environ:
            logger.init_args.project = logger.init_args.get("project") or PROGRAM


def _name_extra(error: BaseException | None) -> None:
    """Say which extra of this package brings the logger's package that an error says is missing.

    Raises:
        ModuleNotFoundError: If the error, or what caused it, says so.
    """
    extra = "tensorboard"
    while error is not None:
        if isinstance(error, ImportError) and extra in str(error):
            raise ModuleNotFoundError(
                f"`{extra}` is not installed. Run: pip install 'lightning-iet[{extra}]'", name=extra
            ) from error
        error = error.__cause__ or error.__context__


class _Metrics(ExperimentWriter):
    """Writes a file of measures, and keeps an earlier one of its name under another; Lightning's removes that."""

    def __init__(self, log_dir: str, name: str) -> None:
        self.NAME_METRICS_FILE = name
        self._has_begun = False
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """Leave the folder as it is until there is something to write."""

    def save(self) -> None:
        """Write what was logged."""
        file = Path(self.metrics_file_path)
        if self.metrics and not self._has_begun and file.is_file():
            names = (file.with_name(f"{file.stem}-{number}.csv") for number in count(1))
            file.rename(next(name for name in names if not name.exists()))
        self._has_begun = self._has_begun or bool(self.metrics)
        super().save()


class _SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml``, which repeats the run, into its folder, whatever the logger calls its own."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the file; the run of a service has its id by now."""
        folder = run_folder(trainer)
        if stage != "fit" and (folder / self.config_filename).exists():  # that of its training
            return
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        if stage == "fit" and config.ckpt_path == "last":
            config.ckpt_path = None
        self.parser.save(
            config, folder / self.config_filename, skip_none=False, overwrite=True, multifile=self.multifile
        )


class _Parser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with errors in one line, and help that begins with the options of the methods."""

    configurations: ClassVar[Sequence[Path]] = ()
    """Files of this command line, in which an unknown key may stand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.add_argument("--help-all", action=_HelpAll, help="Show all options, Lightning's too, and exit.")

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """Write a configuration as text; it was checked when it was parsed, and checks take longer than all else."""
        return super().dump(*args, **{"skip_validation": True, **kwargs})

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Write a configuration into a file, likewise."""
        super().save(*args, **{"skip_validation": True, **kwargs})

    def explained(self, message: str) -> str:
        """Return what a message means, what was probably meant, and in which file it stands."""
        of_classes = {name: f"--{part}.{name}" for part, name in _options_of_classes()}
        of_others = {option.rpartition(".")[2]: option for option in _DEEPER}
        text = explain_error(message, self.likely_options(), names=_class_names())
        if unknown := re.match(r"There is no option `([\w.-]+)`", text):
            if unknown[1] in of_classes:
                text = _of_another_class(*of_classes[unknown[1]].removeprefix("--").split("."))
            text += _place_of(unknown[1], self.configurations)
        options = of_others | of_classes
        return re.sub(r"Option --(\w+)(?= )", lambda found: f"Option {options.get(found[1], f'--{found[1]}')}", text)

    def likely_options(self) -> list[str]:
        """Return all options, with those of classes, that may have been meant."""
        return [*_DEEPER, *(f"--{part}.{name}" for part, name in _options_of_classes()), *self.known_options()]

    def known_options(self) -> list[str]:
        """Return all options; of the whole program, those of its commands. Of a class they have another prefix."""
        commands = getattr(self._subcommands_action, "_name_parser_map", {}).values()
        return [option for parser in commands for option in parser.known_options()] or [
            option for option in super().known_options() if self.is_of_command or "." in option
        ]

    @property
    def is_of_command(self) -> bool:
        """Whether the parser is that of a command, and not that of a class or the whole program."""
        return any(action.dest.startswith("agc.") for action in self._actions)

    def format_help(self) -> str:
        """Return the help of a command, or of a class."""
        if getattr(self, "_inner_parser", False):
            return "\n".join(_class_page(self))
        return "\n".join(_page(self)) if self.is_of_command else super().format_help()

    def format_all(self) -> str:
        """Return the help with the options of all classes."""
        return super().format_help()


class _HelpAll(argparse._HelpAction):
    def __call__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        print(parser.format_all())
        parser.exit()


def _page(parser: _Parser) -> Iterator[str]:
    """Yield the lines of a command's help: its own options first."""
    actions = {action.dest: action for action in parser._actions if not isinstance(action, argparse._HelpAction)}
    for name, text in _TEXTS.items():
        if name in actions:
            actions[name].help = text
    command = parser.prog.rpartition(" ")[2]
    yield f"usage: {PROGRAM} {command} --config NAME_OR_FILE [options]"
    yield f"       {PROGRAM} {command} --images FOLDER [options]"
    yield from ("", f"{_DESCRIPTIONS[command]}", "")
    own = [name for name in _SHOWN_FIRST if name in actions]
    yield from wrapped("--images", "A folder of images to train on; all that is not said is found from them.")
    yield from option_lines([actions[name] for name in own], brief=True)
    for group, kind in METHODS.items():
        yield from ("", *_title(kind.__name__, kind))
        if group == "averaging":
            yield from option_lines([actions["sharding.partition"], actions["sharding.seed"]], brief=True)
        of_group = [action for name, action in actions.items() if name.startswith(f"{group}.")]
        yield from option_lines(of_group, brief=True)
    yield from ("", "Model, data and trainer")
    yield from wrapped("--model.*", f"`{PROGRAM} {command} --model.help DiffusionModule` explains those of a class.")
    yield from wrapped("--data.*", f"`{PROGRAM} {command} --data.help ImageFolderDataModule` likewise.")
    yield from option_lines([actions[f"trainer.{name}"] for name in _OFTEN], brief=True)
    yield from wrapped("OMP_NUM_THREADS", "Threads of the CPU, in the environment; unset, small networks take one.")
    yield from wrapped("--help-all", "Shows all options, Lightning's too.")


def _title(name: str, kind: object) -> list[str]:
    """Return a name, and behind it the first sentence of a docstring."""
    summary = (inspect.getdoc(kind) or "").partition("\n\n")[0]
    return textwrap.wrap(f"{name}: {first_sentence(plain(summary))}", width())


def _class_page(parser: _Parser) -> Iterator[str]:
    """Yield the lines of the help of a class, such as ``--model.help DiffusionModule``."""
    option, _, path = (parser.description or "").removeprefix("Help for ").partition("=")
    part = option.removesuffix(".help")
    yield from (*_title(path.rpartition(".")[2], locate(path)), "")
    actions = [action for action in parser._actions if action.option_strings and not action.dest.endswith("help")]
    yield from option_lines(actions, brief=False)
    yield from ("", f"In a configuration: {part.lstrip('-')}.class_path {path}, and these options under init_args.")


def _of_another_class(part: str, name: str) -> str:
    """Say what to do about an option that the class in the configuration has not, but another has."""
    own = ", or a folder of your own images with --images" if part == "data" else ""
    return (
        f"Option --{part}.{name} does not belong to the class in the configuration. Leave it out, or give another "
        f"class with --{part}{own}."
    )


def _options_of_classes() -> Iterator[tuple[str, str]]:
    """Yield the options of this package's modules and data modules, with the part of a configuration they belong to."""
    for part, package, base in (("model", modules, pl.LightningModule), ("data", data, pl.LightningDataModule)):
        for kind in (getattr(package, name) for name in package.__all__):
            if isinstance(kind, type) and issubclass(kind, base):
                yield from ((part, name) for name in arguments_of(kind))


def _option_of(name: str, error: BaseException, *, images: bool) -> str | None:
    """Return the option of an argument that an error names: by who refused it, or by its name where only one has it.

    Options of models and data are known by who refused them alone: functions call tensors, such as images, likewise.
    """
    if name == "root" and images:
        return "--images"
    of_methods = [f"--{group}.{one}" for group, kind in METHODS.items() for one in arguments_of(kind)]
    found = option_of_owner(name, error, _PARTS)
    if found is not None and found.startswith("--sharding."):
        return _OF_SHARDING.get(name)
    if found is not None:
        return found if found in of_methods or found.startswith(("--data.", "--model.")) else None
    if name in _ARGUMENT_OPTIONS:
        return _ARGUMENT_OPTIONS[name]
    of_trainer = inspect.signature(pl.Trainer).parameters
    own = [*(f"--{one}" for one in _SHOWN_FIRST), *(f"--trainer.{one}" for one in of_trainer)]
    sharding = [_OF_SHARDING.get(one, f"--sharding.{one}") for one in arguments_of(ShardedDataModule)]
    named = {one for one in (*own, *of_methods, *sharding) if re.split(r"\.|--", one)[-1] == name}
    return named.pop() if len(named) == 1 else None


def _class_names() -> dict[str, str]:
    """Return how a configuration names the classes that it may name, by their bare names."""
    libraries = (diffusers, torch.optim, pl.loggers, pl.callbacks)
    found = {name: f"{library.__name__}.{name}" for library in libraries for name in dir(library) if name[0].isupper()}
    for name in ("CSVLogger", "TensorBoardLogger", "WandbLogger"):
        found[name.removesuffix("Logger").lower()] = f"lightning.pytorch.loggers.{name}"
    return found | {name: name for package in (callbacks, data, modules) for name in package.__all__}


def _remove(folders: Sequence[Path]) -> None:
    """Remove the folder of a run, which is the first, and its parents, as far as they are empty."""
    if folders:
        shutil.rmtree(folders[0], ignore_errors=True)
    for folder in folders[1:]:
        with suppress(OSError):
            folder.rmdir()


def run_trainer(args: Sequence[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``plan``."""
    images = any(argument.partition("=")[0] == "--images" for argument in args)
    _Parser.configurations = list(_configurations(args))
    with options_named(lambda name, error: _option_of(name, error, images=images)):
        _check_configurations(_Parser.configurations)
        import_exports(callbacks, data, modules)
        shown = [ParameterSummary(), RunProgressBar()]
        IETCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_class=PlanningTrainer,
            trainer_defaults={"callbacks": shown, "logger": _LOGGER, "enable_model_summary": False},
            parser_class=_Parser,
            parser_kwargs={"prog": PROGRAM, "formatter_class": HelpFormatter},
            save_config_callback=_SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},  # which all runs of a service would share
            command=args[0] if args and args[0] in IETCLI.subcommands() else None,
            args=_with_flags(args),
        )


def _configurations(args: Sequence[str]) -> Iterator[Path]:
    """Yield the files of YAML that a command line names."""
    for argument in args:
        path = Path(argument.partition("=")[2] if argument.startswith("-") else argument)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            yield path


def _check_configurations(files: Sequence[Path]) -> None:
    """Refuse a configuration that is no YAML by its name, which the parser's own message leaves out.

    Raises:
        ValueError: Naming file, line and column.
    """
    for path in files:
        try:
            yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"Argument `config` expected YAML, but got '{path}': {yaml_fault(error)}.") from error


def _place_of(key: str, files: Sequence[Path]) -> str:
    """Say in which file and line a key stands, or the last part of one; nothing, if it was no file's."""
    for path in files:
        for found, line in _keys(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)):
            if f".{found}".endswith(f".{key}"):
                return f" It stands in {path}, line {line}."
    return ""


def _keys(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield the keys of YAML, with those that they stand in before them, and their lines."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _keys(value, f"{prefix}{key.value}.")


def _with_flags(args: Sequence[str]) -> list[str]:
    """Write the one switch of these commands as the parser knows it.

    Example:
        >>> _with_flags(["fit", "--trust_checkpoint", "--ckpt_path", "last"])
        ['fit', '--trust_checkpoint=true', '--ckpt_path', 'last']
    """
    switch = "--trust_checkpoint"
    return [
        f"{switch}=true" if argument == switch and after.lower() not in ("true", "false") else argument
        for argument, after in zip(args, [*args[1:], ""], strict=True)
    ]
