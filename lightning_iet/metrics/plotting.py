"""What metrics share that draw one value, several values, or their course."""

from collections.abc import Sequence
from typing import cast

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from torch import Tensor

from lightning_iet.metrics.base import BaseMetric

__all__ = ["PlottedMetric"]

Values = Tensor | dict[str, Tensor] | Sequence[Tensor] | Sequence[dict[str, Tensor]]


class PlottedMetric(BaseMetric):
    """Base of the metrics that are drawn as torchmetrics draws its own."""

    def plot(self, val: Values | None = None, ax: Axes | None = None) -> tuple[FigureBase, Axes]:
        """Draw one result as points, or several as curves.

        Args:
            val: a result of ``compute`` or ``forward``, or several of them; by default ``compute()``.
            ax: where to draw; by default in a new figure.

        Returns:
            The figure and its axes.
        """
        _, axes = self._plot(val, ax)
        drawn = cast(Axes, axes)
        return drawn.figure, drawn
