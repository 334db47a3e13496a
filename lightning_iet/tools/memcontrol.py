"""Search which part of a model to fine-tune, so that it memorizes little."""

import copy
import gc
import json
import logging
import re
import runpy
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from hashlib import sha256
from inspect import signature
from math import sqrt
from pathlib import Path
from typing import Any, Literal, TextIO

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser

from lightning_iet import data, modules
from lightning_iet.callbacks.parameter_selection import ParameterSelection, find_denoiser, read_mask
from lightning_iet.evaluation.measures import MembershipMeasure
from lightning_iet.evaluation.report import named_figures
from lightning_iet.functional.parameter_groups import Family, Granularity, ParameterGroups
from lightning_iet.modules.adapters import Selection
from lightning_iet.search import Candidate, SelectionSearch, search_selection
from lightning_iet.search.report import CHOSEN
from lightning_iet.search.selection_points import parse_objectives
from lightning_iet.search.selection_search import check_numbers
from lightning_iet.tools.configs import find_configuration
from lightning_iet.utilities.configurations import import_exports, instantiate, leave_weights_out, named_devices
from lightning_iet.utilities.errors import arguments_called, first_line, own_cause
from lightning_iet.utilities.files import METRICS, check_writable
from lightning_iet.utilities.text import counted, say

TRIALS, TRIAL_CONFIG, LOG = "trials", "trial.yaml", "output.log"
LR_OPTION = "model.init_args.optimizer.init_args.lr"
_INTERRUPTED = (1, 130)  # what Lightning and this package's command line exit with after Ctrl-C
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


def memcontrol(
    config: Path,
    *,
    family: Family | None = None,
    granularity: Granularity | None = None,
    trials: int = 50,
    jobs: int = 1,
    out: Path = Path("runs/memcontrol"),
    objectives: Sequence[str] = ("fid", "memorized_fraction"),
    minus_control: bool = True,
    lr: Sequence[float] = (1e-5, 1e-3),
    max_steps: int | None = None,
    checkpoints: int = 3,
    subset: int | None = None,
    repeat: Sequence[int] = (0, 1),
    algorithm: Literal["tpe", "nsga2", "random"] = "tpe",
    storage: str | None = None,
    enqueue: Sequence[str] = (),
    repeat_duplicates: bool = False,
    lr_option: str = LR_OPTION,
    seed: int = 0,
) -> SelectionSearch:
    """Search which part of a model to fine-tune, and how fast, so that it is good and memorizes little.

    MemControl (Dutt et al. 2025): every trial is a short fine-tuning of some blocks of the denoiser, drawn by Optuna
    and judged by two or more figures of the evaluation, each beside that of held-out images. The search begins with
    what it must be compared with: plain fine-tuning, the whole family, and the model as it was. The same command goes
    on with a search that was cut off; several machines with one `--storage` share the work.

    Writes points.csv, front.png, the folder masks, chosen.json, and report.html, which says what was found; and prints
    the command of `fit` that trains the chosen mask, OUT/chosen.json, at the learning rate and the length found.

    Args:
        config: A configuration of `fit` that fine-tunes a model, with its evaluation, or the name of one that comes
            with the package. Options of its group `selection` that are not given here stay, but for mask and file.
            A trial runs on one device.
        family: What can train at all: svdiff, difffit, attention, norm, bias, norm_bias, lora or all; by default the
            configuration's, if it selects anything, else svdiff.
        granularity: What one bit of a mask switches: block, attention or published; by default the configuration's,
            else block.
        trials: Masks to try, among them the whole family at up to three rates, the rest alone and none; plain
            fine-tuning and the pretrained network come on top.
        jobs: Trials at a time, each on its part of the cores, in a process that serves for all its trials.
        out: Folder for the search.
        objectives: Figures to improve, quality first, then memorization: any of those that loggers know as eval/NAME;
            max:NAME for distances, which are to be large.
        minus_control: Whether of memorization only what exceeds that of held-out images counts.
        lr: Lowest and highest learning rate; twice the same keeps it fixed.
        max_steps: Optimizer steps of a trial; by default the configuration's max_steps.
        checkpoints: How often a trial is measured, in equal distances; every time is a point of its own.
        subset: Training images of a trial; by default all.
        repeat: How many of these occur how often, to provoke memorization in a short training. The published search
            repeats a subset 50 times beside one percent of the data.
        algorithm: What draws masks: tpe, nsga2, or random, which is what the published search comes to.
        storage: Where trials are kept: the URL of a database, a file ending in .journal, or an SQLite file.
        enqueue: Masks to try first, right after the whole family.
        repeat_duplicates: Whether a mask is trained again that was tried with about the same learning rate.
        lr_option: Where the configuration has the learning rate.
        seed: Of the search; trainings have the configuration's seed.

    Returns:
        What was found.

    Raises:
        FileNotFoundError: If there is no such configuration.
        ValueError: If the configuration or an option cannot be used, or the trials fail.
    """
    named, config = config, find_configuration(config)
    settings = _read(config, lr_option=lr_option)
    steps = _steps(settings, max_steps, checkpoints)
    if len(lr) != 2:
        raise ValueError(f"Argument `lr` expected two numbers, the lowest and the highest, but got {list(lr)}.")
    if len(repeat) != 2:
        raise ValueError(f"Argument `repeat` expected two numbers, of images and of times, but got {list(repeat)}.")
    with _search_arguments():
        check_numbers(trials=trials, jobs=jobs, seed=seed, learning_rates=(float(lr[0]), float(lr[1])))
    parse_objectives(objectives, minus_control=minus_control)
    settings["data"] = _provoking(settings["data"], subset, repeat, objectives)
    out = Path(out)
    check_writable(out, argument="out", remedy="Give another folder with `--out`.", make=False)
    options = _selection(settings, family, granularity)
    if options["family"] == "svdiff":
        options.setdefault("bases", str((out / "bases").absolute()))
    selection, groups, ema_decay = _find_groups(settings, options)
    if (left := ema_decay**steps) > 0.1 and settings["evaluation"].get("use_ema", True):
        say(
            f"The average of the weights (ema_decay={ema_decay:g}) is what is measured, and after {steps:,} steps "
            f"{left:.0%} of it are still the weights before training: masks will look alike. Set ema_decay: 0, or a "
            "lower one, in the configuration's model."
        )
    training = Training(_for_trials(settings, steps, checkpoints), options, lr_option, out / TRIALS)
    facts = {
        "config": f"{config.name} ({_digest(training.settings)})",
        "network": groups.network, "family": options["family"], "granularity": options["granularity"],
        "steps of a trial": steps, "checkpoints": checkpoints, "training images": subset or "all",
        "repeated images": f"{repeat[0]}, {repeat[1]} times" if repeat[0] else "none",
    }  # fmt: skip
    if isinstance(final := settings["trainer"].get("max_steps"), int) and final > 0:
        say(_effort(trials, steps, final, config.name))
    with _search_arguments():
        found = search_selection(
            training,
            groups,
            out=out,
            objectives=objectives,
            minus_control=minus_control,
            trials=trials,
            jobs=jobs,
            learning_rates=(float(lr[0]), float(lr[1])),
            sampler=algorithm,
            storage=storage,
            enqueue=enqueue,
            repeat_duplicates=repeat_duplicates,
            settings=facts,
            seed=seed,
            selection=selection.selection,
        )
    if found.choice is not None:
        point, _ = found.choice
        given = {
            "config": named, "selection.file": out / CHOSEN, lr_option: f"{point.candidate.learning_rate:.4g}",
            "trainer.max_steps": point.step,
        }  # fmt: skip
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        words += _beside_the_mask(settings, out / CHOSEN)
        if settings["trainer"].get("max_epochs") not in (None, -1):  # which may end before that step
            words.append("--trainer.max_epochs=-1")
        print(f"To train what was chosen: {shlex.join(['lightning-iet', 'fit', *words])}")
    return found


def _effort(trials: int, steps: int, final: int, name: str) -> str:
    """Say how much longer than the training of its mask a search is.

    Example:
        >>> _effort(20, 600, 3_000, "digits.yaml").partition(";")[0]
        '20 masks, 600 steps each, take 4 times the 3,000 steps of digits.yaml in all'
        >>> _effort(1, 1, 15_000, "paper.yaml").partition(";")[0]
        '1 mask of 1 step takes 6.67e-05 times the 15,000 steps of paper.yaml'
    """
    much = f"{trials * steps / final:.3g} times the {counted(final, 'step')} of {name}"
    if trials == 1:
        return f"1 mask of {counted(steps, 'step')} takes {much}; what it is compared with comes on top."
    each = f"{counted(trials, 'mask')}, {counted(steps, 'step')} each"
    return f"{each}, take {much} in all; what they are compared with comes on top."


def _search_arguments() -> AbstractContextManager[None]:
    """Let errors of the search name its arguments as this command does."""
    return arguments_called(learning_rates="lr", sampler="algorithm")


@dataclass(frozen=True)
class Training:
    """Runs `fit` in this process, for a candidate of a search.

    Attributes:
        settings: the configuration of every trial.
        selection: options of :class:`~lightning_iet.callbacks.ParameterSelection` but for the mask.
        lr_option: where the configuration has the learning rate.
        folder: of all trials.
    """

    settings: Mapping[str, Any]
    selection: Mapping[str, Any]
    lr_option: str
    folder: Path

    def __call__(self, candidate: Candidate) -> list[dict[str, float]]:
        """Train, measure, and return the figures of each checkpoint.

        Raises:
            RuntimeError: With the last line of a run that failed.
        """
        folder = self.folder / candidate.name
        shutil.rmtree(folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        config, log = folder.with_suffix(".yaml"), folder.with_suffix(".log")  # the folder is the logger's, until then
        config.write_text(yaml.safe_dump(self.configuration(candidate), sort_keys=False))
        _fit(config, log)
        config.rename(folder / TRIAL_CONFIG)
        log.rename(folder / LOG)
        report = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        untrained = candidate.kind == "pretrained"
        return [{**figures_at(report, point), **({"step": 0} if untrained else {})} for point in report["course"]]

    def configuration(self, candidate: Candidate) -> dict[str, Any]:
        """The configuration of one trial."""
        settings = copy.deepcopy(dict(self.settings))
        folder = (self.folder / candidate.name).absolute()
        logger = {"save_dir": str(folder.parent), "name": "", "version": folder.name}
        settings["trainer"]["logger"] = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger}
        if settings["trainer"].get("devices") in (None, "auto", -1, "-1"):
            # Lightning starts a process for each further one with the words of this command. Not in the settings of
            # all trials, by which a search knows whether it may go on.
            settings["trainer"]["devices"] = 1
        settings.pop("selection", None)
        if candidate.kind == "mask":
            settings["selection"] = {**self.selection, "mask": candidate.mask}
        if candidate.kind == "pretrained":
            # One step at a learning rate of 0 leaves every weight, and the run measures as any other does.
            settings["trainer"]["max_steps"] = 1
            settings["evaluation"].pop("every_n_steps")
        _replace(settings, self.lr_option, candidate.learning_rate)
        return settings


def figures_at(report: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, float]:
    r"""Return the figures of a run at one of its evaluations, with those of the control.

    Args:
        report: what ``metrics.json`` holds.
        point: an entry of its ``course``.

    Returns:
        ``step``; ``fid``, ``memorized_fraction``, ``copied_fraction``, ``mq_0.15`` … and further measures, each with
        ``_control`` where there is one; and of shares ``_control_standard_error``, :math:`\sqrt{p(1 - p)/(n + 2)}`
        with :math:`p = (c + 1)/(n + 2)`, for ``c`` of ``n`` images *(our choice: not 0 where none of them counts)*.
        The AUC of membership inference has the control 0.5, that of a model that never saw the training images, and its
        standard error, :math:`\sqrt{(m + n + 1)/(12 m n)}` for ``m`` training and ``n`` held-out images (Mann and
        Whitney, 1947).
    """
    found: dict[str, float] = {"step": point["step"], "fid_train": report["train"]["fid"]}
    found |= named_figures(point, report["control"])
    total = report["control"]["num_images"]
    for name in ("memorized_fraction", "copied_fraction", *(f"mq_{threshold}" for threshold in point["mq"])):
        share = (found[f"{name}_control"] * total + 1) / (total + 2)
        found[f"{name}_control_standard_error"] = sqrt(share * (1 - share) / (total + 2))
    if "membership_inference_auc" in found:
        sizes = report["data"]["num_train"], report["data"]["num_held_out"]
        members, others = (min(size, MembershipMeasure.images) for size in sizes)
        found.setdefault("membership_inference_auc_control", 0.5)
        error = sqrt((members + others + 1) / (12 * members * others))
        found.setdefault("membership_inference_auc_control_standard_error", error)
    return {name: float("nan") if value is None else value for name, value in found.items()}


def _read(config: Path, *, lr_option: str) -> dict[str, Any]:
    """Read a configuration of `fit`, and refuse one that cannot be searched."""
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Argument `config` expected YAML, but got '{config}' ({first_line(error)}).") from error
    if not isinstance(settings, dict) or "model" not in settings or "data" not in settings:
        raise ValueError(
            f"Argument `config` expected a configuration of `fit` with model and data, but got '{config}'."
        )
    settings.setdefault("trainer", {})
    settings["evaluation"] = dict(settings.get("evaluation") or {})
    if settings["evaluation"].get("num_samples") == 0:
        raise ValueError(
            "Argument `config` expected an evaluation, but got num_samples 0. A search needs its figures: at least 2."
        )
    _refuse_what_no_trial_can(settings)
    try:
        _replace(copy.deepcopy(settings), lr_option, 0.0)
    except KeyError as error:
        raise ValueError(
            f"Argument `lr_option` expected where '{config}' has its learning rate, but got {lr_option!r}, and there "
            f"is no {error.args[0]!r}. Write an optimizer with a learning rate into the file, or name its place."
        ) from None
    return settings


def _refuse_what_no_trial_can(settings: Mapping[str, Any]) -> None:
    """Refuse options that would fail every trial, or mean something else in one."""
    trainer, averaging, selection = (settings.get(name) or {} for name in ("trainer", "averaging", "selection"))
    nodes, shards = trainer.get("num_nodes") or 1, averaging.get("num_shards") or 1
    for name, got, reason in (
        ("trainer.num_nodes of 1", nodes, "A trial runs on one device: share the work of a search with `--storage`"),
        (
            "one device (trainer.devices)",
            trainer.get("devices") if named_devices(trainer.get("devices")) > 1 else 1,
            "Trials share a process, which trains on one device: for several, give each a program with `--storage`",
        ),
        ("averaging.num_shards of 1", shards, "Search without shards, then train the mask with them"),
    ):
        if got != 1:
            raise ValueError(f"Argument `config` expected {name}, but got {got!r}. {reason}.")
    if selection.get("rest") is not None:
        raise ValueError(
            f"Argument `config` expected no rest in `selection`, which a search decides by a bit of its masks, but got "
            f"{selection['rest']}. Remove it."
        )


def _selection(settings: Mapping[str, Any], family: Family | None, granularity: Granularity | None) -> dict[str, Any]:
    """Options of ParameterSelection for all trials: those that were given, the configuration's, the defaults."""
    known = dict(settings.get("selection") or {})
    if known.pop("mask", None) is None and known.get("family") == "all":  # as every run without a selection writes it
        del known["family"]
    known.pop("file", None)
    words = {
        "family": family or known.get("family") or "svdiff",
        "granularity": granularity or known.get("granularity") or "block",
    }
    return known | words


def _beside_the_mask(settings: Mapping[str, Any], chosen: Path) -> list[str]:
    """Options of `fit` that undo what the configuration selects and the file of a mask does not.

    Args:
        settings: The configuration.
        chosen: File of the mask.
    """
    names = {option.name for option in fields(Selection)}
    given = {name: value for name, value in (settings.get("selection") or {}).items() if name in names}
    saved = read_mask(chosen)
    mended = {name: getattr(saved.selection, name) for name in saved.contradicted(Selection(**given))}
    if "mask" in mended:
        mended["mask"] = None  # the file has it
    return [
        f"--selection.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in mended.items()
    ]


def _provoking(
    known: Mapping[str, Any], subset: int | None, repeat: Sequence[int], objectives: Sequence[str]
) -> dict[str, Any]:
    """The data module's settings with a smaller training set, some of whose images occur many times."""
    if repeat[0] < 0 or repeat[1] < 1 or (subset is not None and not max(1, repeat[0]) <= subset):
        raise ValueError(
            f"Arguments `subset` and `repeat` expected at least 1 image, and no more that repeat than there are, but "
            f"got {subset} and {list(repeat)}."
        )
    if repeat[0] and any(objective.endswith("memorized_fraction") for objective in objectives):
        raise ValueError(
            "Argument `objectives` expected a figure that sees copies of images that repeat, but got "
            "memorized_fraction, which does not. Take copied_fraction."
        )
    _parse(pl.LightningDataModule, "data", known)  # which imports classes by their short names
    changed = copy.deepcopy(dict(known))
    wanted: dict[str, Sequence[dict[str, int]]] = {}
    if subset is not None:
        wanted["subset"] = {"subset": subset}, {"num_train": subset}
    if repeat[0]:
        wanted["repeat"] = ({"repeated_images": repeat[0], "repeats": repeat[1]},)
    for argument, spellings in wanted.items():
        for options in spellings:
            tried = {**changed, "init_args": {**(changed.get("init_args") or {}), **options}}
            try:
                _parse(pl.LightningDataModule, "data", tried)
            except (ArgumentError, ValueError, TypeError, KeyError):
                continue
            changed = tried
            break
        else:
            raise ValueError(
                f"Argument `{argument}` expected a data module with options {' or '.join(map(', '.join, spellings))}, "
                f"but got {known['class_path']}, which has none. Make its training set in the configuration."
            )
    if repeat[0]:
        _check_repeats(changed, repeat[0])
    return changed


def _check_repeats(settings: Mapping[str, Any], repeated: int) -> None:
    """Refuse more images that repeat than there are: makes the training set once, as every trial will."""
    parser, parsed = _parse(pl.LightningDataModule, "data", settings)
    module = _make(parser, parsed).data
    module.prepare_data()
    try:
        module.setup("fit")
    except ValueError as error:
        found = re.search(r"`repeated` expected an integer from 0 to (\d+)", str(error))
        if found is None:
            raise
        raise ValueError(
            f"Argument `repeat` expected no more images than the {found[1]} that are trained on, but got {repeated}."
        ) from error


def _make(parser: LightningArgumentParser, parsed: Any) -> Any:
    """Make the objects that parsed settings describe."""
    try:
        return instantiate(parser, parsed)
    except ValueError as error:
        raise own_cause(error) or error from None  # without all that jsonargparse tried


def _parse(base: type, name: str, settings: Mapping[str, Any]) -> tuple[LightningArgumentParser, Any]:
    """Read the settings of a module as `fit` does, without making it; the parser makes it."""
    import_exports(data, modules)
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(base, name, subclass_mode=True)
    return parser, parser.parse_object({name: copy.deepcopy(settings)})


def _replace(settings: dict[str, Any], option: str, value: Any) -> None:
    """Set an entry that is there, by its dotted name; KeyError with the part of the name that is not."""
    entries: Any = settings
    names = option.split(".")
    for number, name in enumerate(names, 1):
        if not isinstance(entries, dict) or name not in entries:
            raise KeyError(".".join(names[:number]))
        if number < len(names):
            entries = entries[name]
    entries[names[-1]] = value


def _steps(settings: Mapping[str, Any], steps: int | None, checkpoints: int) -> int:
    """Length of a trial; refuse one that cannot be divided."""
    if steps is None:
        steps = settings["trainer"].get("max_steps", -1)
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(
                "Argument `max_steps` expected an integer ≥ 1, but got none, and the configuration's trainer has no "
                "max_steps. Give the length of a trial with `--max-steps`."
            )
    if steps < 1 or checkpoints < 1 or steps % checkpoints:
        raise ValueError(
            "Arguments `max_steps` and `checkpoints` expected integers ≥ 1, of which the second divides the first, but "
            f"got {steps} and {checkpoints}."
        )
    return steps


def _for_trials(settings: Mapping[str, Any], steps: int, checkpoints: int) -> dict[str, Any]:
    """The configuration as trials run it: short, measured on the way, and without checkpoints on disk."""
    changed = copy.deepcopy(dict(settings))
    trainer, evaluation = changed["trainer"], changed["evaluation"]
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    trainer["callbacks"] = [one for one in callbacks if not str(one.get("class_path")).endswith("ModelCheckpoint")]
    trainer |= {
        "max_steps": steps, "max_epochs": -1, "enable_checkpointing": False, "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
    }  # fmt: skip
    evaluation |= {"every_n_steps": steps // checkpoints, "pictures": False}
    for option in ("every_n_epochs", "keep_best", "patience"):  # every checkpoint of a trial counts
        evaluation.pop(option, None)
    return changed


def _digest(settings: Mapping[str, Any]) -> str:
    return sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _find_groups(
    settings: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[ParameterSelection, ParameterGroups, float]:
    """Build the model once, to see which groups it has, and how slow the average of its weights is (0 = none)."""
    unknown = set(options) - set(signature(ParameterSelection).parameters)
    if unknown:
        raise ValueError(f"Argument `config` expected options of ParameterSelection in `selection`, but got {unknown}.")
    selection = ParameterSelection(**options)
    of_data = (settings["data"] or {}).get("init_args") or {}
    parser, parsed = _parse(pl.LightningModule, "model", settings["model"])
    leave_weights_out(parsed.model.init_args or {}, of_data)
    module = _make(parser, parsed).model
    network = find_denoiser(module, selection.denoiser, any_network=selection.selection.groups is not None)
    if network is None:
        raise ValueError(
            f"Argument `config` expected a model with a denoiser that has blocks, but {type(module).__name__} has "
            "none. Say where it is with `denoiser` in the configuration's `selection`, or name groups there."
        )
    decay = float(getattr(module, "ema_decay", 0) or 0) if getattr(module, "ema", None) is not None else 0.0
    return selection, selection.selection.find(network), decay


def _fit(config: Path, log: Path) -> None:
    """Run `lightning-iet fit` in this process: what it has imported stays for the next trial.

    Raises:
        RuntimeError: If it fails, with its last line.
        KeyboardInterrupt: If it was interrupted: the search ends, and the trial is run again.
        SystemExit: If it was sent SIGTERM; likewise.
    """
    arguments, handler = sys.argv, signal.getsignal(signal.SIGINT)
    with log.open("w", encoding="utf-8") as file:
        try:
            with _logged(file):
                sys.argv = ["lightning-iet", "fit", f"--config={config}"]
                runpy.run_module("lightning_iet", run_name="__main__")
        except SystemExit as end:
            if end.code in _INTERRUPTED:
                signal.signal(signal.SIGINT, handler)  # Lightning lets it be ignored from then on
                raise KeyboardInterrupt from None
            if end.code == 128 + signal.SIGTERM:
                raise
            if end.code:
                file.flush()
                said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise RuntimeError(f"{said[-1] if said else f'exit status {end.code}'} (see {log})") from None
        finally:
            sys.argv = arguments
            gc.collect()  # modules and trainers hold each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@contextmanager
def _logged(file: TextIO) -> Iterator[None]:
    """Send all that a run prints and logs to a file."""
    handlers = {  # one may belong to several loggers
        handler
        for name in _LOGGERS
        for handler in logging.getLogger(name).handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    }
    streams = {handler: handler.stream for handler in handlers}
    for handler in handlers:
        handler.setStream(file)
    try:
        with redirect_stdout(file), redirect_stderr(file):
            yield
    finally:
        for handler, stream in streams.items():
            handler.setStream(stream)
