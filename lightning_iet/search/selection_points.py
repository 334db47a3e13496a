"""What a search for a selection improves, and what it has found: objectives, points, their front, and the choice."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeAlias

import torch

from lightning_iet.functional.pareto import Choice, choose_point, pareto_front
from lightning_iet.utilities.files import write_csv

_CONTROL = "_control"
_ERROR = "_control_standard_error"


@dataclass(frozen=True)
class Objective:
    """A figure that a search improves.

    Attributes:
        name: of the figure, such as ``fid``. ``NAME_control`` is the same figure of held-out real images, which nobody
            can have memorized, and ``NAME_control_standard_error`` the standard error of that.
        maximize: whether more of it is better (of distances to training images).
        minus_control: whether only what lies beyond the control counts: ``max(0, a - control)``, for a figure that is
            maximised ``max(0, control - a)``, minimised in both cases.

    Example:
        >>> objective = Objective("memorized_fraction", minus_control=True)
        >>> objective.value({"memorized_fraction": 0.25, "memorized_fraction_control": 0.125})
        0.125
        >>> objective.label
        'memorized_fraction beyond control'
    """

    name: str
    maximize: bool = False
    minus_control: bool = False

    @property
    def label(self) -> str:
        """How tables and axes call the objective's value."""
        return f"{self.name} beyond control" if self.minus_control else self.name

    @property
    def direction(self) -> str:
        """``minimize`` or ``maximize``: what a search does with :meth:`value`."""
        return "maximize" if self.maximize and not self.minus_control else "minimize"

    def value(self, figures: Mapping[str, float]) -> float:
        """Return the figure of this name, or what of it lies beyond its control.

        Raises:
            KeyError: if a figure that is needed is not there; its only argument is a sentence that says which.
            ArithmeticError: if it is NaN or infinite.
        """
        figure = self._finite(figures, self.name)
        if not self.minus_control:
            return figure
        control = self._finite(figures, self.name + _CONTROL)
        return max(0.0, control - figure if self.maximize else figure - control)

    def cost(self, value: float) -> float:
        """Return a value so that less is better."""
        return -value if self.direction == "maximize" else value

    def control(self, figures: Mapping[str, float]) -> float | None:
        """Return the value that held-out images have, or None where the figures hold no control."""
        if self.minus_control:
            return 0.0
        control = figures.get(self.name + _CONTROL)
        return control if control is not None and isfinite(control) else None

    def control_error(self, figures: Mapping[str, float]) -> float | None:
        """Return the standard error of the control, or None where the figures do not tell."""
        error = figures.get(self.name + _ERROR)
        return error if error is not None and isfinite(error) else None

    def _finite(self, figures: Mapping[str, float], name: str) -> float:
        if name not in figures:
            remedy = " Or leave the control out with `minus_control=False`." if name != self.name else ""
            raise KeyError(
                f"Argument `objectives` expected figures that a trial measures, but `{name}` is not among "
                f"{', '.join(sorted(figures)) or 'none at all'}. Name another, or have the evaluation measure it."
                f"{remedy}"
            )
        figure = figures[name]
        if figure is None or not isfinite(figure):
            raise ArithmeticError(f"{name} is {figure}")
        return float(figure)


def parse_objectives(names: Sequence[str], *, minus_control: bool = True) -> tuple[Objective, ...]:
    """Read objectives: quality first, then figures of memorization.

    Args:
        names: ``[max:|min:]NAME``, of at least two figures; ``eval/`` before a name, as loggers write it, is left out.
            Distances to training images are to be maximised: ``max:average_minimum_distance``.
        minus_control: whether of all but the first only what lies beyond the control counts.

    Returns:
        The objectives.

    Raises:
        ValueError: for fewer than two, for one that is named twice, or for what is no name.

    Example:
        >>> for objective in parse_objectives(["eval/fid", "max:eval/average_minimum_distance"]):
        ...     print(objective.label, objective.direction)
        fid minimize
        average_minimum_distance beyond control minimize
    """
    if isinstance(names, str) or len(names) < 2:
        raise ValueError(
            f"Argument `objectives` expected at least two figures, quality first and then memorization, but got "
            f"{names!r}. For example: fid memorized_fraction."
        )
    objectives = tuple(_parse(name, minus_control=minus_control and number > 0) for number, name in enumerate(names))
    plain = [objective.name for objective in objectives]
    twice = next((name for name in plain if plain.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"Argument `objectives` expected every figure once, but got `{twice}` twice.")
    return objectives


def _parse(text: str, *, minus_control: bool) -> Objective:
    direction, colon, name = text.rpartition(":")
    name = name.removeprefix("eval/")
    if (colon and direction not in ("min", "max")) or not re.fullmatch(r"[\w@./-]+", name):
        raise ValueError(
            f"Argument `objectives` expected [max:|min:]NAME of a figure, but got {text!r}. For example: "
            "max:average_minimum_distance."
        )
    return Objective(name, maximize=direction == "max", minus_control=minus_control)


Figures: TypeAlias = Mapping[str, float]
Kind: TypeAlias = Literal["mask", "plain", "pretrained"]


@dataclass(frozen=True)
class Candidate:
    """What a trial is to train.

    Attributes:
        name: of the trial, fit for a folder: ``trial-007``, ``plain-1``, ``pretrained-0``.
        kind: ``mask``; ``plain`` for fine-tuning of every parameter of the network, the course to compare with; or
            ``pretrained`` for the network as it was, to be measured without training.
        mask: one character for each group, ``1`` if it trains; empty for the other kinds.
        learning_rate: of the optimizer; 0 for ``pretrained``.

    Example:
        >>> Candidate("trial-007", "mask", "0110", 1e-4).trained(["a", "b", "c", "rest"])
        ['b', 'c']
    """

    name: str
    kind: Kind
    mask: str
    learning_rate: float

    def trained(self, groups: Sequence[str]) -> list[str]:
        """Return the groups that train."""
        return [group for group, bit in zip(groups, self.mask, strict=False) if bit == "1"]


@dataclass(frozen=True)
class Point:
    """A trial at one of its checkpoints.

    Attributes:
        candidate: what was trained.
        number: of the trial.
        step: optimizer steps so far.
        values: of the objectives, in their order.
        figures: all that was measured, by name.
        trained: number of trained parameters; None where the sizes of the groups are not known.
        share: trained parameters over those of the original network; None where that is not known.
        seconds: of the whole trial.
        last: whether it is the last checkpoint of its trial.
        copied_from: trial with the same mask and learning rate whose figures these are.
    """

    candidate: Candidate
    number: int
    step: int
    values: tuple[float, ...]
    figures: Figures
    trained: int | None = None
    share: float | None = None
    seconds: float = 0.0
    last: bool = True
    copied_from: str = ""


@dataclass(frozen=True)
class SelectionSearch:
    """What a search has found so far.

    Attributes:
        groups: names of the groups, one for each character of a mask.
        sizes: number of parameters of each group; empty if not known.
        objectives: quality first.
        points: of masks, by trial and step.
        references: points of plain fine-tuning and of the pretrained network.
        failures: why trials failed, by name.
        settings: of the search, by name, for the report.
        running: trials that other programs run now.
    """

    groups: tuple[str, ...]
    objectives: tuple[Objective, ...]
    points: tuple[Point, ...]
    references: tuple[Point, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    running: int = 0

    @property
    def all_points(self) -> tuple[Point, ...]:
        """Points of masks, then those of the references."""
        return (*self.points, *self.references)

    @property
    def labels(self) -> list[str]:
        """How the objectives are called."""
        return [objective.label for objective in self.objectives]

    def costs(self, points: Sequence[Point]) -> torch.Tensor:
        """Return the objectives of points, all to be minimised, float64, shape ``(N, p)``."""
        rows = [[o.cost(v) for o, v in zip(self.objectives, point.values, strict=True)] for point in points]
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, len(self.objectives))

    @cached_property
    def front(self) -> tuple[Point, ...]:
        """Points of masks that no other one dominates, best quality first; what was copied counts once."""
        seen, own = set(), []
        for point in sorted(self.points, key=lambda point: bool(point.copied_from)):
            key = (point.candidate.mask, point.step, point.values)
            if not point.copied_from or key not in seen:
                own.append(point)
            seen.add(key)
        keep = pareto_front(self.costs(own)).tolist() if own else []
        found = [point for point, stays in zip(own, keep, strict=True) if stays]
        return tuple(sorted(found, key=lambda point: (self.objectives[0].cost(point.values[0]), point.number)))

    @property
    def controls(self) -> tuple[float | None, ...]:
        """Value of each objective for held-out images, the mean over all trials, None where it was not measured."""
        return tuple(_mean([o.control(point.figures) for point in self.all_points]) for o in self.objectives)

    @property
    def control_errors(self) -> tuple[float | None, ...]:
        """Standard error of each control, the mean over all trials, None where it is not known."""
        return tuple(_mean([o.control_error(point.figures) for point in self.all_points]) for o in self.objectives)

    @property
    def limits(self) -> tuple[float | None, ...]:
        """What each objective of memorization may cost at most: its control and, where known, a standard error."""
        parts = zip(self.objectives, self.controls, self.control_errors, strict=True)
        costs = [None if control is None else o.cost(control) + (error or 0.0) for o, control, error in parts]
        return tuple(costs[1:])

    @cached_property
    def choice(self) -> tuple[Point, Choice] | None:
        """The point that :func:`~lightning_iet.functional.pareto.choose_point` takes, among those that train."""
        able = [point for point in self.points if point.candidate.kind == "mask" and not point.copied_from]
        if not able:
            return None
        limits = [limit for limit in self.limits if limit is not None]
        choice = choose_point(
            self.costs(able),
            limits=limits if len(limits) == len(self.objectives) - 1 else None,
            trained=[point.trained or 0 for point in able],
        )
        return able[choice.point], choice

    def course(self, *, kind: Kind, mask: str = "") -> dict[str, list[Point]]:
        """Return points by trial, in the order of their steps: of plain fine-tuning, or of one mask."""
        trials: dict[str, list[Point]] = {}
        for point in self.all_points:
            if point.candidate.kind == kind and point.candidate.mask == mask and not point.copied_from:
                trials.setdefault(point.candidate.name, []).append(point)
        return trials

    def at_quality(self, points: Sequence[Point], quality: float) -> Point | None:
        """Return the point that memorizes least of those whose first objective costs at most ``quality``, or None."""
        costs = self.costs(points)
        able = [(row[1:], point) for row, point in zip(costs.tolist(), points, strict=True) if row[0] <= quality]
        return min(able, key=lambda pair: pair[0])[1] if able else None


def described(candidate: Candidate) -> str:
    """Say in a few words what a candidate trains.

    Example:
        >>> described(Candidate("trial-007", "mask", "0110", 1e-4))
        '2 of 4 groups at learning rate 0.0001'
    """
    if candidate.kind == "pretrained":
        return "the pretrained network"
    groups = f"{candidate.mask.count('1')} of {len(candidate.mask)} groups"
    return f"{'all parameters' if candidate.kind == 'plain' else groups} at learning rate {candidate.learning_rate:.2g}"


def write_points(search: SelectionSearch, path: Path) -> None:
    """Write one row for each point and each failed trial."""
    figures = sorted({name for point in search.all_points for name in point.figures})
    front, chosen = set(map(id, search.front)), search.choice[0] if search.choice else None
    rows: list[dict[str, Any]] = [
        {
            "trial": point.candidate.name, "kind": point.candidate.kind, "mask": point.candidate.mask,
            "learning_rate": f"{point.candidate.learning_rate:.6g}", "step": point.step,
            **{o.label: value for o, value in zip(search.objectives, point.values, strict=True)},
            "trained": point.trained, "share": point.share, "seconds": f"{point.seconds:.2f}",
            "state": "copied" if point.copied_from else "complete", "note": point.copied_from,
            "front": int(id(point) in front), "chosen": int(point is chosen),
        }
        for point in search.all_points
    ]  # fmt: skip
    taken = set(rows[0]) if rows else set()  # a figure that is called like a column must not take its place
    for row, point in zip(rows, search.all_points, strict=True):
        row |= {name: point.figures.get(name) for name in figures if name not in taken}
    failed: list[dict[str, Any]] = [
        {"trial": name, "state": "failed", "note": reason} for name, reason in search.failures.items()
    ]
    write_csv(path, [*rows, *failed])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
