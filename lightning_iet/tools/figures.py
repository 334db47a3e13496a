"""Pictures of images.

Each function returns a :class:`matplotlib.figure.Figure` of its own and leaves matplotlib's global state alone, so that
a notebook or a training script which draws pictures of its own is not disturbed. Images are float in [0, 1].
"""

from collections.abc import Sequence
from math import ceil, sqrt
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from lightning_iet.tools.run_folder import write_atomically

__all__ = ["image_grid", "nearest_pairs", "save_figure"]

DPI = 150
INK, QUIET = "#222222", "#767676"
GENERATED, CONTROL = "#c8501e", "#1f6f9f"  # orange and blue stay apart for colour-blind readers


def image_grid(images: Tensor, *, title: str = "", columns: int | None = None, side: int = 64) -> Figure:
    """Shows images in rows and columns.

    Small images are enlarged by a whole factor without blurring: what one sees are the pixels.

    Args:
        images: ``(N, C, H, W)`` with one, three or four channels; transparency is laid over white.
        title: one line above the images.
        columns: images in a row; the default makes the grid about as wide as high.
        side: height and width in pixels up to which small images are enlarged.

    Returns:
        The figure; its size in pixels follows from the images.

    Example:
        >>> import torch
        >>> figure = image_grid(torch.rand(12, 1, 8, 8), columns=4, side=64)
        >>> [round(length * DPI) for length in figure.get_size_inches()]  # 4 × 64 and 3 × 64, with gaps and margins
        [326, 256]
    """
    columns = columns or ceil(sqrt(len(images)))
    if images.shape[1] == 4:
        images = 1 - images[:, 3:] * (1 - images[:, :3])
    grid = make_grid(_enlarge(images, side), nrow=columns, padding=6, pad_value=1.0)
    height, width = grid.shape[-2:]
    margin, header, min_width = (20, 56, 760) if title else (20, 20, 0)
    total = (max(width + 2 * margin, min_width), height + header + margin)
    # A hundredth more, for matplotlib rounds the size down and 55 / 150 * 150 is less than 55.
    figure = Figure(figsize=((total[0] + 0.01) / DPI, (total[1] + 0.01) / DPI), dpi=DPI, facecolor="white")
    # Exact positions: one pixel of the grid is one pixel of the file, which keeps the enlarged pixels square.
    box = ((total[0] - width) / 2 / total[0], margin / total[1], width / total[0], height / total[1])
    _show(figure.add_axes(box), grid)
    figure.text(0.5, 1 - 28 / total[1], title, color=INK, fontsize=9, ha="center", va="center")
    return figure


def nearest_pairs(
    generated: Tensor, training: Tensor, ratios: Sequence[float], indices: Sequence[int], *, limit: float = 1 / 3
) -> Figure:
    """Shows generated images beside the training image nearest to each, with ``d1 / d2`` above.

    Args:
        generated: ``(N, C, H, W)``.
        training: ``(N, C, H, W)``, the nearest training image of each.
        ratios: ``N`` values of ``d1 / d2``, plain distances to the nearest and the second nearest training image.
        indices: ``N`` positions of these images in the training set.
        limit: a ratio below it counts as memorized and is printed in colour.

    Returns:
        The figure, four pairs in a row.
    """
    columns = min(4, len(generated))
    rows = ceil(len(generated) / columns)
    figure = Figure(
        figsize=(max(2.1 * columns, 5.6), 1.32 * rows + 0.55), dpi=DPI, facecolor="white", layout="constrained"
    )
    figure.suptitle(
        "Generated images closest to a training image\n"
        f"$d_1 / d_2$: distance to the nearest over the second nearest; below {limit:.2f} (colour) counts as memorized",
        color=INK, fontsize=9,
    )  # fmt: skip
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, new, old, ratio, index in zip(
        panels, _enlarge(generated, 96), _enlarge(training, 96), ratios, indices, strict=False
    ):
        _show(panel, make_grid([new, old], nrow=2, padding=8, pad_value=1.0))
        panel.set_title(f"$d_1 / d_2$ = {ratio:.3f}", fontsize=8, color=GENERATED if ratio < limit else INK, pad=2)
        for position, text in ((0.25, "generated"), (0.75, f"training #{index}")):
            panel.text(position, -0.02, text, transform=panel.transAxes, fontsize=7, color=QUIET, ha="center", va="top")
    for panel in panels:
        panel.set_axis_off()
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure to ``path``, atomically, in the format of its suffix."""
    with write_atomically(path) as unfinished:
        figure.savefig(unfinished)


def _enlarge(images: Tensor, side: int) -> Tensor:
    """Repeats pixels by a whole factor, to about ``side``; grey images become RGB."""
    factor = max(1, round(side / max(images.shape[-2:])))
    images = images.detach().cpu().float().clamp(0, 1)
    return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1).expand(-1, 3, -1, -1)


def _show(axes: Axes, image: Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_axis_off()
