"""Labels beside the points of a chart, none on top of another."""

from collections.abc import Mapping
from itertools import product
from typing import cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox, offset_copy

__all__ = ["label_points"]

_DIRECTIONS = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))


def label_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> list[Text]:
    """Writes each label beside its point, where it covers neither a point nor another label.

    Places are tried from near to far in eight directions; a label that ends up farther off is tied to its point by a
    line. Where everything is taken the label stays beside its point, on top of another one.

    Args:
        axes: axes of a figure whose layout and limits are otherwise final.
        points: ``{label: (x, y)}`` in data coordinates.

    Returns:
        The labels, in the order of ``points``.

    Example:
        >>> axes = Figure().subplots()
        >>> near, far = label_points(axes, {"here": (0.50, 0.5), "there": (0.51, 0.5)})
        >>> bool(near.get_window_extent().overlaps(far.get_window_extent()))
        False
    """
    figure = cast(Figure, axes.get_figure(root=True))
    figure.draw_without_rendering()  # settles the layout, without which no extent is known
    labels: list[Text] = []
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in axes.transData.transform(list(points.values()))]
    for label, point in points.items():
        for reach, (right, up) in product((9, 20, 32, 46, 60), _DIRECTIONS):
            text = _text_beside(axes, label, point, right * reach, up * reach)
            box = text.get_window_extent()
            if not box.count_overlaps(taken) and axes.bbox.count_contains(box.corners()) == 4:
                break
            text.remove()
        else:  # a crowd: rather a label on top of another than a point without one
            reach, text = 0, _text_beside(axes, label, point, 9, 0)
            box = text.get_window_extent()
        labels.append(text)
        taken.append(box)
        if reach > 9:
            line = {"arrowstyle": "-", "color": "#767676", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
            tip = (right * reach, up * reach)
            axes.annotate("", point, xytext=tip, textcoords="offset points", arrowprops=line).set_in_layout(False)
    return labels


def _text_beside(axes: Axes, label: str, point: tuple[float, float], right: int, up: int) -> Text:
    """Writes a label a number of typographic points away from a point of the chart."""
    shifted = offset_copy(axes.transData, fig=axes.get_figure(root=True), x=right, y=up, units="points")
    horizontal = "center" if right == 0 else "left" if right > 0 else "right"
    vertical = "center" if up == 0 else "bottom" if up > 0 else "top"
    text = axes.text(*point, label, transform=shifted, fontsize=8.5, color="#222222", ha=horizontal, va=vertical)
    text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # readable on top of a line
    text.set_in_layout(False)
    return text
