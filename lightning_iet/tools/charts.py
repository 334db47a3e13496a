"""Curves and points: how a run went, and how runs compare.

Each function returns a :class:`matplotlib.figure.Figure` of its own, as in :mod:`lightning_iet.tools.figures`.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from lightning_iet.tools.figures import CONTROL, DPI, GENERATED, INK, QUIET
from lightning_iet.tools.labels import label_points

__all__ = ["loss_gap", "memorization_against_fid", "memorized_quantity_curve", "training_curves"]


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
    window = 1 + 2 * (len(losses) // 50)
    epochs = range(1, len(losses) + 1)
    if window > 1:
        panel.plot(epochs, losses, color="#c9c9c9", linewidth=0.8)
    panel.plot(
        epochs, _smooth(losses, window), color=INK, linewidth=1.4, marker="" if window > 1 else "o", markersize=4
    )
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if losses and 0 < 5 * min(losses) < max(losses):
        _log_axis(panel)
    if skip_rate is not None:
        title = "Skipped by anti-gradient control" + ("" if threshold is None else f", threshold {threshold:g}")
        panel = _chart(next(panels), title=title, xlabel="timestep", ylabel="share of samples skipped")
        panel.stairs(skip_rate, _edges(skip_rate, num_timesteps), fill=True, color=GENERATED)
        panel.yaxis.set_major_formatter(_percent)
        panel.set_ylim(0, max(0.01, panel.get_ylim()[1]))
    if loss_by_timestep is not None:
        panel = _chart(next(panels), title="Loss by timestep", xlabel="timestep", ylabel="mean loss")
        panel.stairs(loss_by_timestep, _edges(loss_by_timestep, num_timesteps), baseline=None, color=INK, linewidth=1.4)
        _log_axis(panel)
    return figure


def loss_gap(
    training_loss: Tensor,
    unseen_loss: Tensor,
    skip_rate: Tensor,
    *,
    epochs_per_row: int = 1,
    num_timesteps: int = 1000,
) -> Figure:
    """Draws how training losses sink under those of unseen images, and what anti-gradient control leaves out.

    Args:
        training_loss: mean loss in each stretch of epochs and bin of the timestep, ``(n, bins)``, NaN where none was
            seen.
        unseen_loss: the same of unseen images.
        skip_rate: share of samples left out, likewise.
        epochs_per_row: epochs in a stretch.
        num_timesteps: number of timesteps that the bins divide.

    Returns:
        The figure: both losses over epochs, their ratio over epochs and timesteps, and the skip rate if it is not 0.
    """
    skips = bool((skip_rate > 0).any())
    figure = Figure(figsize=(12.6 if skips else 9.2, 3.4), dpi=DPI, facecolor="white", layout="constrained")
    losses, ratios, *others = figure.subplots(1, 2 + skips)
    window = 1 + 2 * (len(training_loss) // 50)
    epochs = [(row + 0.5) * epochs_per_row for row in range(len(training_loss))]
    _chart(losses, title="Loss, mean of all timesteps", xlabel="epoch", ylabel="loss")
    for label, rows, colour in (("unseen images", unseen_loss, CONTROL), ("training images", training_loss, GENERATED)):
        losses.plot(epochs, _smooth(_filled(rows), window), color=colour, linewidth=1.6, label=label)
    losses.legend(frameon=False, fontsize=8.5, labelcolor="linecolor")
    _log_axis(losses)
    for panel in others:
        _chart(panel, title="Skipped by anti-gradient control", xlabel="epoch", ylabel="share of samples skipped")
        panel.plot(epochs, _smooth(_filled(skip_rate), window), color=GENERATED, linewidth=1.6)
        panel.yaxis.set_major_formatter(_percent)
        panel.set_ylim(0, max(0.01, panel.get_ylim()[1]))
    _chart(ratios, title="Training loss / unseen loss (1: no memorization)", xlabel="epoch", ylabel="timestep")
    extent = (0.0, float(len(training_loss) * epochs_per_row), 0.0, float(num_timesteps))
    image = ratios.imshow(
        (training_loss / unseen_loss).T.numpy(),
        origin="lower",
        aspect="auto",
        extent=extent,
        cmap="viridis",
        vmin=0,
        vmax=1.2,
    )
    ratios.grid(visible=False)
    figure.colorbar(image, ax=ratios)
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
    axes.yaxis.set_major_formatter(_percent)
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
    marks = [*runs.values(), control, (training_fid or 0.0, 0.0)]
    right, top = (max(values) for values in zip(*marks, (0.1, 0.02), strict=True))
    axes.set(xlim=(0, 1.15 * right), ylim=(-0.04 * top, 1.12 * top))
    axes.yaxis.set_major_formatter(_percent)
    figure.legend(frameon=False, fontsize=8.5, loc="outside lower center", ncols=2)
    if crowd:
        names = "\n".join(f"{number:\u2007>2}  {label}" for number, label in enumerate(runs, 1))
        axes.text(1.02, 1, names, transform=axes.transAxes, fontsize=7.5, color=INK, va="top")
    label_points(axes, {str(n) if crowd else label: point for n, (label, point) in enumerate(runs.items(), 1)})
    return figure


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


def _percent(share: float, _position: float) -> str:
    return f"{100 * share:.3g}%"


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over a window around each value, shorter at the ends."""
    half = window // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _filled(rows: Tensor) -> list[float]:
    """Mean of each row; what is not known is taken from the row before, or rows would not compare."""
    rows = rows.clone()
    for before, row in pairwise(rows):
        row[:] = torch.where(row.isnan(), before, row)
    return rows.nanmean(1).tolist()


def _edges(bins: Sequence[float], num_timesteps: int) -> list[float]:
    return torch.linspace(0, num_timesteps, len(bins) + 1).tolist()
