"""What a search minimises or maximises: figures by name, each with its direction and its held-out control."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

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
        """Return the objective's value from the figures of a trial.

        Args:
            figures: by name.

        Returns:
            The figure, or what of it lies beyond its control.

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
