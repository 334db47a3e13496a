"""Searches which groups of parameters to train, and with which learning rate, for several objectives at once."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import isfinite, log, nan, sqrt
from pathlib import Path
from typing import Any, TypeAlias

import rich
from rich.console import Console

from lightning_iet.callbacks.parameter_selection import write_mask
from lightning_iet.functional.checks import check_at_least
from lightning_iet.functional.parameter_groups import REST, ParameterGroups
from lightning_iet.modules.adapters import Selection
from lightning_iet.search.jobs import Outcome, Workers
from lightning_iet.search.report import CHOSEN, FRONT, MASKS, POINTS, REPORT, front_table, write_search
from lightning_iet.search.selection_points import (
    Candidate,
    Figures,
    Objective,
    Point,
    SelectionSearch,
    described,
    parse_objectives,
    write_points,
)
from lightning_iet.search.shared_study import SharedStudy, StudyTrial, named_sampler, open_storage, shown_storage
from lightning_iet.utilities.errors import require
from lightning_iet.utilities.files import check_writable
from lightning_iet.utilities.progress import progress_bar
from lightning_iet.utilities.text import counted, in_words, say

Measure: TypeAlias = Callable[[Candidate], Figures | Sequence[Figures]]

RATE = "learning rate"
SAME_RATE = 1.05  # learning rates whose ratio is at most this count as one
FAILURES = 3  # trials, none of which worked, after which something is wrong with all of them


def search_selection(
    train_and_measure: Measure,
    groups: ParameterGroups | Sequence[str] | Mapping[str, int],
    *,
    out: Path | str,
    objectives: Sequence[str] = ("fid", "memorized_fraction"),
    minus_control: bool = True,
    trials: int = 50,
    jobs: int = 1,
    learning_rates: tuple[float, float] = (1e-5, 1e-3),
    sampler: str | Callable[[int], Any] = "tpe",
    storage: str | Path | None = None,
    enqueue: Sequence[str] = (),
    references: bool = True,
    repeat_duplicates: bool = False,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    selection: Selection | None = None,
    progress: bool = True,
) -> SelectionSearch:
    r"""Search which groups of parameters to train: short trainings, drawn by Optuna, with several objectives.

    Dutt et al. 2025 (MemControl, arXiv:2405.19458): a bit for each group says whether it trains, and a multi-objective
    search over bits and learning rate minimises a measure of quality and one of memorization. *(our choice: the
    sampler and its options are named, every checkpoint of a trial is a point, memorization counts beyond that of
    held-out images, a mask that repeats is not trained again, and the search begins with what it must be compared
    with.)* Tried first, at the geometric middle of the learning rates and at both ends: plain fine-tuning and the whole
    family (all ones), the middle before ``enqueue``, the ends after it; then the pretrained network without training
    and only the rest (all zeros but the last bit, if that group is called ``rest``).

    A search that was killed goes on when it is called again with the same arguments: trials that were cut off are run
    again, as are references and first masks that failed, which still count once. Programs on several machines that are
    given one ``storage`` share the work.

    Args:
        train_and_measure: Trains what a :class:`Candidate` says and returns figures by name; or a list of such
            mappings, one for each checkpoint, each with its ``step``. Figures of held-out images are called
            ``NAME_control``. Raise any error where a trial fails.
        groups: Groups of the network, see :func:`~lightning_iet.functional.parameter_groups.find_groups`; their rest
            is searched as one more bit, unless it always trains. Or names of groups in the order of a mask's
            characters, or the number of parameters of each group by name.
        out: Folder for the results: ``points.csv``, a row for each checkpoint of each trial; ``front.png``;
            ``masks/*.json`` and ``chosen.json``, files of masks; ``report.html``; and ``search.db``.
        objectives: Figures to improve, quality first, then memorization: ``[max:]NAME``, see
            :func:`~lightning_iet.search.selection_points.parse_objectives`.
        minus_control: Whether of memorization only what lies beyond its control counts.
        trials: Number of masks to try, repeated and failed ones included. References come on top.
        jobs: Trials at a time, each in a process of its own that serves for all its trials; the function must then be
            one that :mod:`pickle` takes. With 1 it is called in this process.
        learning_rates: Range, drawn log-uniformly; twice the same number keeps it fixed.
        sampler: ``tpe``, ``nsga2``, ``random`` (what the published search comes to), or a function that makes any
            sampler of Optuna's from a seed.
        storage: URL of a database, path of a ``.journal`` or of an SQLite file; ``search.db`` in ``out`` by default.
        enqueue: Further masks to try first, right after all ones, at the middle learning rate.
        references: Whether plain fine-tuning and the pretrained network are measured as well, to compare with.
        repeat_duplicates: Whether a mask is trained again that was tried with about the same learning rate.
        settings: What else decides on the figures (family, steps, …): kept in the storage, in which a search with
            others is refused, and shown in the report.
        seed: Of the draws; with one job the same seed draws the same trials.
        selection: What ``groups`` were found with, for the files of masks; needed for options of ``lora``.
        progress: Whether to show a bar and a line for each trial.

    Returns:
        All points, the front, and the choice.

    Raises:
        ValueError: if an argument is out of range, if the storage holds another search, if a figure is missing, or if
            the first trials all fail.
        ModuleNotFoundError: without Optuna.

    Example:
        >>> import tempfile
        >>> def train_and_measure(candidate):
        ...     on = candidate.mask.count("1")
        ...     return {"fid": 9.0 - on, "memorized": 0.1 * on, "memorized_control": 0.1}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     search = search_selection(
        ...         train_and_measure, ["down", "mid", "up"], objectives=["fid", "memorized"], trials=12,
        ...         learning_rates=(1e-4, 1e-4), references=False, out=folder, progress=False)
        >>> [(point.candidate.mask.count("1"), point.values) for point in search.front][-1]
        (1, (8.0, 0.0))
        >>> search.choice[1].rule
        'control'
    """
    wanted = parse_objectives(objectives, minus_control=minus_control)
    found = groups if isinstance(groups, ParameterGroups) else None
    sizes = _sizes(groups) if isinstance(groups, ParameterGroups) else groups
    enqueue = [enqueue] if isinstance(enqueue, str) else list(enqueue)
    names = _check_groups(sizes, enqueue)
    check_numbers(trials=trials, jobs=jobs, seed=seed, learning_rates=learning_rates)
    if trials < (needed := len({"1" * len(names), *enqueue})):
        raise ValueError(
            f"Argument `trials` expected at least {needed}, for all ones and the masks of `enqueue`, but got {trials}."
        )
    if callable(sampler):
        make, sampler_name = sampler, getattr(sampler, "__name__", type(sampler).__name__)
    else:
        make, sampler_name = named_sampler(sampler, trials=trials)
    folder = Path(out)
    check_writable(folder, argument="out", remedy="Give another folder with `out`.")
    facts = dict(settings or {})
    low, high = map(float, learning_rates)
    space = _Space(
        names=names,
        sizes=tuple(sizes.values()) if isinstance(sizes, Mapping) else (),
        always=found.count("0" * len(names)) if found is not None else 0,
        network_size=found.total if found is not None else None,
        objectives=wanted,
        settings={
            **facts,
            "trials": trials, "learning rates": f"{low:g} to {high:g}", "sampler": sampler_name, "seed": seed,
            "storage": shown_storage(storage or "search.db"),
        },
    )  # fmt: skip
    masks, courses = _studies(space, open_storage(storage, folder), facts, (low, high), make, seed)
    rates = [sqrt(low * high), low, high] if low < high else [low]
    if references:
        for rate in rates:
            courses.enqueue({"course": "plain", RATE: rate})
        courses.enqueue({"course": "pretrained", RATE: rates[0]})
    for mask, rate in _first_masks(names, rates, enqueue):
        masks.enqueue({**{name: int(bit) for name, bit in zip(names, mask, strict=True)}, RATE: rate})
    result = _run(
        _Measuring(train_and_measure),
        space, masks, courses,
        trials=trials, jobs=jobs, repeat=repeat_duplicates, folder=folder, progress=progress,
    )  # fmt: skip
    write = None if found is None else partial(write_mask, groups=found, selection=selection)
    write_search(result, folder, write_mask=write)
    if progress:
        rich.get_console().print(front_table(result))
        say(f"Written to {folder}: {REPORT}, {FRONT}, {POINTS}, {CHOSEN}, {MASKS}/")
        if result.running:
            run, they_have = ("runs", "it has") if result.running == 1 else ("run", "they have")
            again = f"give the same command again when {they_have} ended"
            say(f"{counted(result.running, 'trial')} {run} elsewhere: {again}.")
    return result


def _sizes(groups: ParameterGroups) -> dict[str, int]:
    """Number of parameters under each bit."""
    named = {**{group.name: group.parameters for group in groups.groups}, REST: groups.rest}
    return {name: sum(groups.numel[parameter] for parameter in named[name]) for name in groups.bits}


@dataclass(frozen=True)
class _Measuring:
    """Calls the user's function and brings what it returns into one form."""

    function: Measure

    def __call__(self, candidate: Candidate) -> list[dict[str, float]]:
        measured = self.function(candidate)
        checkpoints = [measured] if isinstance(measured, Mapping) else list(measured)
        if not checkpoints or not all(isinstance(figures, Mapping) for figures in checkpoints):
            raise TypeError(f"expected figures by name, or a list of such, but the training returned {measured!r}")
        return [
            {str(name): nan if figure is None else float(figure) for name, figure in figures.items()}
            for figures in checkpoints
        ]


@dataclass(frozen=True)
class _Space:
    """What all trials of a search have in common."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    always: int  # parameters that train under every mask
    network_size: int | None
    objectives: tuple[Objective, ...]
    settings: Mapping[str, Any]

    def candidate(self, trial: StudyTrial, *, course: bool) -> Candidate:
        """What a trial trains; an all-zero mask trains nothing and is the pretrained network."""
        rate = float(trial.parameters[RATE])
        if course:
            kind = trial.parameters["course"]
            return Candidate(f"{kind}-{trial.number}", kind, "", rate if kind == "plain" else 0.0)
        mask = "".join(str(trial.parameters[name]) for name in self.names)
        if "1" in mask or self.always:
            return Candidate(f"trial-{trial.number:03d}", "mask", mask, rate)
        return Candidate(f"trial-{trial.number:03d}", "pretrained", mask, 0.0)

    def points(self, trial: StudyTrial, *, course: bool) -> Iterator[Point]:
        """The points of a complete trial."""
        candidate, trained, share = self.candidate(trial, course=course), None, None
        if candidate.kind == "plain":
            trained = self.network_size
        elif self.sizes or candidate.kind == "pretrained":
            trained = self.always if candidate.kind == "mask" else 0
            trained += sum(size for size, bit in zip(self.sizes, candidate.mask, strict=False) if bit == "1")
        if trained is not None and self.network_size:
            share = trained / self.network_size
        *_, end = trial.result["points"]
        for point in trial.result["points"]:
            yield Point(
                candidate, trial.number, point["step"], tuple(point["values"]), point["figures"],
                trained=trained, share=share, seconds=trial.result["seconds"], last=point is end,
                copied_from=trial.result.get("copied_from", ""),
            )  # fmt: skip

    def result(self, masks: SharedStudy, courses: SharedStudy) -> SelectionSearch:
        """All that the storage knows."""
        tried, compared = masks.trials(), courses.trials()
        ended = [(trial, False) for trial in tried] + [(trial, True) for trial in compared]
        return SelectionSearch(
            groups=self.names,
            objectives=self.objectives,
            points=tuple(p for t in tried if t.state == "complete" for p in self.points(t, course=False)),
            references=tuple(p for t in compared if t.state == "complete" for p in self.points(t, course=True)),
            failures={self.candidate(t, course=c).name: t.reason for t, c in ended if t.state == "failed"},
            settings=self.settings,
            sizes=self.sizes,
            running=masks.num_elsewhere + courses.num_elsewhere,
        )

    def measured(self, outcome: Outcome) -> tuple[list[dict[str, Any]], str]:
        """The points of a trial that has ended, or why there are none.

        Raises:
            ValueError: if an objective is not among the figures: it will not be in any trial's.
        """
        if outcome.error:
            return [], outcome.error
        points = []
        for number, figures in enumerate(outcome.value, 1):
            try:
                values = [objective.value(figures) for objective in self.objectives]
            except KeyError as error:
                raise ValueError(error.args[0]) from error
            except ArithmeticError as error:
                return [], str(error)
            known = {name: figure for name, figure in figures.items() if name != "step" and isfinite(figure)}
            points.append({"step": int(figures.get("step", number)), "values": values, "figures": known})
        return points, ""


def _studies(
    space: _Space, storage: Any, facts: Mapping[str, Any], rates: tuple[float, float], sampler: Any, seed: int
) -> tuple[SharedStudy, SharedStudy]:
    """Open the study of the masks and that of the references."""
    kinds = require("optuna", "sweep").distributions
    rate = kinds.FloatDistribution(*rates, log=True)
    common: dict[str, Any] = {
        "objectives": {objective.label: objective.direction for objective in space.objectives},
        "facts": {
            **facts,
            "groups": {name: number for number, name in enumerate(space.names, 1)},
            "learning rates": f"{rates[0]:g} to {rates[1]:g}",
        },
    }
    bits = {name: kinds.CategoricalDistribution((0, 1)) for name in space.names}
    course = kinds.CategoricalDistribution(("plain", "pretrained"))
    return (
        SharedStudy(storage, "masks", space={**bits, RATE: rate}, sampler=sampler, seed=seed, **common),
        SharedStudy(storage, "references", space={"course": course, RATE: rate}, **common),
    )


def _nothing_works(which: str, reason: str) -> ValueError:
    return ValueError(
        f"The search expected trainings that work, but {which} failed, the last one with: {reason.rstrip('.')}."
    )


def _trained(found: SelectionSearch) -> bool:
    """Whether a mask was trained; neither the pretrained network, nor a reference that has the same mask, is one."""
    return any(point.candidate.kind == "mask" and not point.copied_from for point in found.points)


def _run(
    measuring: _Measuring, space: _Space, masks: SharedStudy, courses: SharedStudy, *,
    trials: int, jobs: int, repeat: bool, folder: Path, progress: bool,
) -> SelectionSearch:  # fmt: skip
    """Run trials until there are enough, and return what was found."""
    owners: dict[str, tuple[SharedStudy, int]] = {}
    failed = failed_masks = 0
    tried, compared = masks.trials(), courses.trials()
    done = sum(trial.state in ("complete", "failed") for trial in (*tried, *compared))
    console = Console(file=sys.stdout)  # bound to what is the terminal now: trainings may send theirs elsewhere
    with ExitStack() as stack:
        for study in (masks, courses):
            stack.enter_context(study)
        workers = stack.enter_context(Workers(measuring, jobs))
        bar = stack.enter_context(
            progress_bar(
                "Trials", trials + len(compared), completed=done, hidden=not progress, is_slow=True, console=console
            )
        )
        while True:
            while workers.is_free:
                study, trial = courses, courses.next()
                if trial is None:
                    study, trial = masks, masks.next(trials)
                if trial is None:
                    break
                candidate = space.candidate(trial, course=study is courses)
                earlier = None if repeat or study is courses else _earlier(space, candidate, masks, courses)
                if earlier is not None:
                    source, name = earlier
                    result = {**source.result, "copied_from": name}
                    study.tell(trial.number, result["points"][-1]["values"], result)
                    bar.say(f"{candidate.name}: same mask and learning rate as {name}")
                    bar.advance()
                    continue
                owners[candidate.name] = study, trial.number
                workers.start(candidate)
            if not workers.is_busy:
                break
            for outcome in workers.finished():
                study, number = owners.pop(outcome.task.name)
                try:
                    points, reason = space.measured(outcome)
                except ValueError as error:
                    study.fail(number, str(error))
                    used = masks.num_elsewhere + courses.num_elsewhere > 0
                    stack.close()
                    if not used and not any(t.has_figures for t in (*masks.trials(), *courses.trials())):
                        masks.discard()  # they would keep the objective that no trial has
                        courses.discard()
                    raise
                if reason:
                    bar.say(f"{outcome.task.name}: failed: {reason}", style="red")
                    study.fail(number, reason)
                    failed, failed_masks = failed + 1, failed_masks + (study is masks)
                else:
                    bar.say(_ended(space, outcome, points))
                    result = {"points": points, "seconds": outcome.seconds}
                    study.tell(number, points[-1]["values"], result)
                bar.advance()
            found = space.result(masks, courses)
            write_points(found, folder / POINTS)
            if failed >= FAILURES and not found.points and not found.references:
                raise _nothing_works(f"the first {failed}", reason)
            # References train in another way: that they work says little of masks.
            if failed_masks >= 2 * FAILURES and not _trained(found):
                raise _nothing_works(f"the first {failed_masks} masks", reason)
    found = space.result(masks, courses)
    if not found.points and found.running:
        run, they_have = ("runs", "it has") if found.running == 1 else ("run", "they have")
        raise ValueError(
            f"The search expected masks that were tried, but {counted(found.running, 'trial')} still {run} elsewhere, "
            f"and none has ended well. Give the same command again when {they_have} ended."
        )
    if not found.points or (failed_masks and not _trained(found)):
        raise ValueError("All trials of the search failed: " + "; ".join(sorted(set(found.failures.values()))) + ".")
    return found


def _earlier(
    space: _Space, candidate: Candidate, masks: SharedStudy, courses: SharedStudy
) -> tuple[StudyTrial, str] | None:
    """The complete trial whose figures are this candidate's, and its name."""
    for study in (masks, courses):
        for trial in study.trials():
            if trial.state != "complete" or "copied_from" in trial.result:
                continue
            other = space.candidate(trial, course=study is courses)
            if candidate.kind == other.kind == "pretrained":
                return trial, other.name
            same = candidate.kind == other.kind and candidate.mask == other.mask
            if same and abs(log(candidate.learning_rate / other.learning_rate)) <= log(SAME_RATE):
                return trial, other.name
    return None


def _first_masks(names: Sequence[str], rates: Sequence[float], enqueue: Iterable[str]) -> Iterator[tuple[str, float]]:
    """Masks that are tried first, each with its learning rate; those of the user before what may be left out."""
    ones, zeros = "1" * len(names), "0" * len(names)
    for mask in (ones, *enqueue):
        yield mask, rates[0]
    for rate in rates[1:]:
        yield ones, rate
    if names[-1] == "rest" and len(names) > 1:
        yield zeros[:-1] + "1", rates[0]
    yield zeros, rates[0]


def _ended(space: _Space, outcome: Outcome, points: Sequence[Mapping[str, Any]]) -> str:
    """Say what a trial that went well has come to."""
    values = zip(space.objectives, points[-1]["values"], strict=True)
    words = ", ".join(f"{objective.label} {value:.4g}" for objective, value in values)
    return f"{outcome.task.name}: {described(outcome.task)}: {words} ({in_words(outcome.seconds)})"


def _check_groups(groups: Sequence[str] | Mapping[str, int], enqueue: Sequence[str]) -> tuple[str, ...]:
    """Names of the groups; refuse what is no list of them, and masks that do not fit."""
    names = tuple(groups)
    if isinstance(groups, str) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"Argument `groups` expected names of groups, at least one, but got {groups!r}.")
    twice = next((name for name in names if names.count(name) > 1 or name == RATE), None)
    if twice is not None:
        raise ValueError(f"Argument `groups` expected every name once, and none called '{RATE}', but got '{twice}'.")
    for mask in enqueue:
        if len(mask) != len(names) or set(mask) - set("01"):
            raise ValueError(
                f"Argument `enqueue` expected masks of {len(names)} characters 0 and 1, for {', '.join(names)}, "
                f"but got {mask!r} of {len(mask)}."
            )
    return names


def check_numbers(*, trials: int, jobs: int, seed: int, learning_rates: tuple[float, float]) -> None:
    """Refuse numbers out of range."""
    check_at_least(1, trials=trials, jobs=jobs)
    check_at_least(0, seed=seed)
    low, high = learning_rates
    if not 0 < low <= high or not isfinite(high):
        raise ValueError(
            f"Argument `learning_rates` expected 0 < lowest ≤ highest, but got {low:g} and {high:g}. Turn them around?"
        )
