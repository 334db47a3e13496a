"""The pictures of a run, and of several runs beside one another.

Each function returns a :class:`matplotlib.figure.Figure` of its own and leaves matplotlib's global state alone, so that
a notebook or a training script which draws pictures of its own is not disturbed. Images are float in [0, 1].
"""

from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from torch import Tensor
from torchvision.utils import make_grid

from lightning_iet.tools.labels import label_points
from lightning_iet.tools.run_folder import write_atomically

__all__ = [
    "image_grid",
    "memorization_against_fid",
    "memorized_quantity_curve",
    "nearest_pairs",
    "save_figure",
    "training_curves",
]

DPI = 150
INK, QUIET = "#222222", "#767676"
GENERATED, CONTROL = "#c8501e", "#1f6f9f"  # orange and blue stay apart for colour-blind readers


def image_grid(images: Tensor, *, title: str = "", columns: int | None = None, side: int = 64) -> Figure:
    """Shows images in rows and columns.

    Small images are enlarged by a whole factor without blurring: what one sees are the pixels.

    Args:
        images: ``(N, C, H, W)`` with one or three channels.
        title: one line above the images.
        columns: images in a row; the default makes the grid about as wide as high.
        side: height and width in pixels up to which small images are enlarged.

    Returns:
        The figure; its size in pixels follows from the images.

    Example:
        >>> figure = image_grid(torch.rand(12, 1, 8, 8), columns=4, side=64)
        >>> [round(length * DPI) for length in figure.get_size_inches()]  # 4 × 64 and 3 × 64, with gaps and margins
        [326, 256]
    """
    columns = columns or ceil(sqrt(len(images)))
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


def training_curves(
    losses: Sequence[float],
    *,
    skip_rate: Sequence[float] | None = None,
    loss_by_timestep: Sequence[float] | None = None,
    threshold: float | None = None,
    num_timesteps: int = 1000,
) -> Figure:
    """Draws the loss by epoch and, where anti-gradient control ran, skip rate and loss by timestep.

    Args:
        losses: mean training loss of each epoch.
        skip_rate: share of samples skipped in equal bins of the timestep, NaN where none was seen.
        loss_by_timestep: mean loss in equal bins of the timestep, NaN where none was seen.
        threshold: the threshold of anti-gradient control, for the title.
        num_timesteps: number of timesteps that the bins divide.

    Returns:
        The figure, with one panel for each curve that was given.
    """
    wanted = [True, skip_rate is not None, loss_by_timestep is not None]
    figure = Figure(figsize=(4.2 * sum(wanted), 3.3), dpi=DPI, facecolor="white", layout="constrained")
    panels = iter(figure.subplots(1, sum(wanted), squeeze=False).flat)
    panel = _chart(next(panels), title="Training loss", xlabel="epoch", ylabel="mean loss of all samples")
    panel.plot(range(1, len(losses) + 1), losses, color=INK, linewidth=1.4, marker="o" if len(losses) < 20 else "")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if skip_rate is not None:
        title = "Skipped by anti-gradient control" + ("" if threshold is None else f", threshold {threshold:g}")
        panel = _chart(next(panels), title=title, xlabel="timestep", ylabel="share of samples skipped")
        panel.stairs(skip_rate, _edges(skip_rate, num_timesteps), fill=True, color=GENERATED)
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        panel.set_ylim(0, max(0.01, panel.get_ylim()[1]))
    if loss_by_timestep is not None:
        panel = _chart(next(panels), title="Loss by timestep", xlabel="timestep", ylabel="mean loss")
        panel.stairs(loss_by_timestep, _edges(loss_by_timestep, num_timesteps), baseline=None, color=INK, linewidth=1.4)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
    return figure


def memorized_quantity_curve(
    generated: Mapping[float, float], control: Mapping[float, float], *, k: int = 50
) -> Figure:
    """Draws the memorized quantity as a share of the images against the threshold.

    Args:
        generated: ``{threshold: share}`` of the generated images.
        control: the same for held-out real images, which nobody can have memorized.
        k: number of nearest training images in the mean, for the label.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(5.6, 3.8), dpi=DPI, facecolor="white", layout="constrained")
    axes = _chart(
        figure.subplots(),
        title="Memorized quantity (MQ)",
        xlabel=f"threshold on nearest / mean of the {k} nearest squared distances",
        ylabel="share of images below it",
    )
    for shares, colour, marker, label in (
        (generated, GENERATED, "o", "generated"),
        (control, CONTROL, "s", "held-out control (no memorization)"),
    ):
        axes.plot(
            list(shares), list(shares.values()), color=colour, marker=marker, markersize=5, linewidth=1.6, label=label
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(-0.02, 1.02)
    figure.legend(frameon=False, fontsize=8.5, loc="outside lower center", ncols=2, labelcolor="linecolor")
    return figure


def memorization_against_fid(
    runs: Mapping[str, tuple[float, float]], *, control: tuple[float, float], training_fid: float | None = None
) -> Figure:
    """Draws each run as a point: memorized fraction over FID. Lower left is better.

    Args:
        runs: ``{label: (FID, memorized fraction)}``; every point carries its label, or its number when there are many.
        control: the same of held-out real images, drawn as two lines: no run can be expected beyond them.
        training_fid: FID of the training images themselves, what copying alone would give, drawn as a line.

    Returns:
        The figure.
    """
    crowd = len(runs) > 10
    size = (8.6, max(4.6, 1 + 0.135 * len(runs))) if crowd else (6.4, 4.6)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    axes = _chart(
        figure.subplots(),
        title="Memorization against quality (lower left is better)",
        xlabel="FID to held-out images",
        ylabel="memorized fraction",
    )
    axes.axvline(control[0], color=CONTROL, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.axhline(
        control[1], color=CONTROL, linewidth=1.2, linestyle=(0, (4, 3)), label="held-out real images (control)"
    )
    if training_fid is not None:
        axes.axvline(
            training_fid, color=QUIET, linewidth=1.2, linestyle=":", label="FID of the training images themselves"
        )
    for point in runs.values():
        axes.plot(*point, marker="o", markersize=7, color=GENERATED, linestyle="")
    right, top = (max(values) for values in zip(*runs.values(), control, (0.1, 0.02), strict=True))
    axes.set(xlim=(0, 1.15 * right), ylim=(-0.04 * top, 1.12 * top))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    figure.legend(frameon=False, fontsize=8.5, loc="outside lower center", ncols=2)
    if crowd:
        names = "\n".join(f"{number:\u2007>2}  {label}" for number, label in enumerate(runs, 1))
        axes.text(1.02, 1, names, transform=axes.transAxes, fontsize=7.5, color=INK, va="top")
    label_points(axes, {str(n) if crowd else label: point for n, (label, point) in enumerate(runs.items(), 1)})
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


def _chart(axes: Axes, *, title: str, xlabel: str, ylabel: str) -> Axes:
    """Gives axes the plain look that all charts share."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(xlabel, fontsize=8.5, color=INK)
    axes.set_ylabel(ylabel, fontsize=8.5, color=INK)
    axes.tick_params(labelsize=8, colors=QUIET, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _edges(bins: Sequence[float], num_timesteps: int) -> list[float]:
    return torch.linspace(0, num_timesteps, len(bins) + 1).tolist()
