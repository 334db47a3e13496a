"""Every plot: images, curves, distances."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import ceil, isfinite, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox, offset_copy
from torch import Tensor

from lightning_iet.utilities.files import write_atomically

DPI = 150
INK, QUIET = "#222222", "#767676"
GENERATED, CONTROL = "#c8501e", "#1f6f9f"  # orange and blue stay apart for colour-blind readers


def image_grid(images: Tensor, *, title: str = "", columns: int | None = None, side: int = 64) -> Figure:
    """Show images in rows and columns.

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
    grid = _grid(_enlarge(images, side), columns=columns, padding=6)
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
    generated: Tensor,
    training: Tensor,
    ratios: Sequence[float],
    names: Sequence[str],
    *,
    limit: float = 1 / 3,
    marked: Sequence[bool] | None = None,
    label: str = "$d_1 / d_2$",
    title: str = "",
) -> Figure:
    """Show generated images beside the training image nearest to each, with ``d1 / d2`` above.

    Args:
        generated: ``(N, C, H, W)`` with one, three or four channels; transparency is laid over white.
        training: ``(N, C, H, W)``, the nearest training image of each.
        ratios: ``N`` values of ``d1 / d2``, plain distances to the nearest and the second nearest training image.
        names: ``N`` names of these training images, such as those of their files, or their positions as text; long
            ones are cut in the middle.
        limit: a ratio below it counts as memorized and is printed in colour.
        marked: whose ratios are printed in colour, where it is not by the limit.
        label: what the ratios are, where they are not ``d1 / d2``.
        title: above all pairs; by default it explains ``d1 / d2``.

    Returns:
        The figure, four pairs in a row.
    """
    marked = [ratio < limit for ratio in ratios] if marked is None else marked
    columns = min(4, len(generated))
    rows = ceil(len(generated) / columns)
    figure = _figure(max(2.1 * columns, 5.6), 1.32 * rows + 0.55)
    explained = (
        "Generated images closest to a training image\n"
        f"$d_1 / d_2$: distance to the nearest over the second nearest; below {limit:.2f} (colour) counts as memorized"
    )
    figure.suptitle(_wrapped(title, figure) if title else explained, color=INK, fontsize=9)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, new, old, ratio, name, colour in zip(
        panels, _enlarge(generated, 96), _enlarge(training, 96), ratios, names, marked, strict=False
    ):
        _show(panel, _grid(torch.stack([new, old]), columns=2, padding=8))
        panel.set_title(f"{label} = {ratio:.3f}", fontsize=8, color=GENERATED if colour else INK, pad=2)
        training_name = f"training #{name}" if name.isdecimal() else _shortened(name, 16)
        _label_pair(panel, "generated", training_name, below=0.02, fontsize=7)
    for panel in panels:
        panel.set_axis_off()
    return figure


@dataclass(frozen=True)
class RunPairs:
    """Generated images of one run, each with the training image nearest to it.

    Attributes:
        title: What the run is, and what was counted.
        pairs: Generated and training images, shape ``(N, 2, C, H, W)``.
        ratios: ``N`` values of ``d1 / d2``, near-duplicates among the training images counted as one.
        occurrences: How often each of these training images occurs.
    """

    title: str
    pairs: Tensor
    ratios: Sequence[float]
    occurrences: Sequence[int]


def pairs_of_runs(runs: Sequence[RunPairs], *, limit: float = 1 / 3, columns: int = 6) -> Figure:
    """Show runs one below the other: generated images beside their nearest training images.

    Args:
        runs: At least one.
        limit: A ratio below it counts as a copy, and is printed in colour.
        columns: Pairs in a row.

    Example:
        >>> import torch
        >>> figure = pairs_of_runs([RunPairs("plain: 1 copy", torch.rand(2, 2, 1, 8, 8), [0.1, 0.9], [20, 1])])
        >>> [axes.get_title() for axes in figure.axes]
        ['copy · 0.10', '0.90']
    """
    rows = [ceil(len(run.pairs) / columns) for run in runs]
    cell, heading, line, foot = (1.6, 1.12), 0.4, 0.2, 0.3  # inches
    width, height = cell[0] * columns, heading * len(runs) + cell[1] * sum(rows) + foot
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    top = height
    for run, rows_of_run in zip(runs, rows, strict=True):
        figure.text(0.08 / width, (top - 0.16) / height, run.title, color=INK, fontsize=10, weight="bold", va="center")
        top -= heading
        for number, (pair, ratio, times) in enumerate(zip(run.pairs, run.ratios, run.occurrences, strict=True)):
            left, above = number % columns * cell[0], top - number // columns * cell[1] - line
            box = left + 0.08, above - (cell[0] - 0.16) / 2, cell[0] - 0.16, (cell[0] - 0.16) / 2
            panel = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
            is_copy = ratio < limit
            _show(panel, _grid(_enlarge(pair, 96), columns=2, padding=6))
            text = f"copy · {ratio:.2f}" if is_copy else f"{ratio:.2f}"
            panel.set_title(text, fontsize=8, color=GENERATED if is_copy else INK, pad=2)
            often = f"training, {times} ×" if times > 1 else "training"
            _label_pair(panel, "generated", often, below=0.03, fontsize=6.5)
        top -= rows_of_run * cell[1]
    figure.text(
        0.08 / width, 0.12 / height,
        "Above each pair: distance to the nearest training image over that to the next one that shows something else; a"
        f" copy is below {limit:.2f}. “20 ×”: so often it occurs in the training set.",
        fontsize=6.5, color=QUIET,
    )  # fmt: skip
    return figure


_LETTERS = 13  # letters of a title to an inch
CAPTION = 20  # letters of a caption over an image


def captioned_grid(images: Sequence[Tensor], captions: Sequence[str], *, title: str, columns: int = 8) -> Figure:
    """Plot images with a caption above each.

    Args:
        images: Each of shape ``(C, H, W)`` in [0, 1] with one, three or four channels; sizes may differ.
        captions: One per image; long lines, such as names of files, are cut in the middle.
        title: Above all of them, in as many lines as it takes.
        columns: Images in a row, at most.

    Example:
        >>> import torch
        >>> figure = captioned_grid([torch.rand(1, 8, 8)] * 3, ["a", "b", "c"], title="images")
        >>> [axes.get_title() for axes in figure.axes]
        ['a', 'b', 'c']
    """
    columns = min(columns, len(images))
    rows = ceil(len(images) / columns)
    figure = _figure(max(1.15 * columns, 5.6), 1.5 * rows + 0.5)
    figure.suptitle(_wrapped(title, figure), color=INK, fontsize=9)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, image, caption in zip(panels, images, captions, strict=False):
        _show(panel, _enlarge(image[None], 96)[0])
        shortened = "\n".join(_shortened(line, CAPTION) for line in caption.splitlines())
        panel.set_title(shortened.replace("$", r"\$"), fontsize=6, color=INK, pad=2)
    for panel in figure.axes:
        panel.set_axis_off()
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to ``path``, atomically, in the format of its suffix."""
    lay_out(figure)
    with write_atomically(path) as unfinished:
        figure.savefig(unfinished)


def lay_out(figure: Figure) -> None:
    """Arrange a figure for good; Matplotlib would arrange and draw it twice whenever it is written."""
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
        figure.set_layout_engine(None)


def _grid(images: Tensor, *, columns: int, padding: int) -> Tensor:
    """Put RGB images side by side on white, ``columns`` in a row."""
    from torchvision.utils import make_grid  # seconds of imports, which a table and a chart do not need

    return make_grid(images, nrow=columns, padding=padding, pad_value=1.0)


def _enlarge(images: Tensor, side: int) -> Tensor:
    """Repeat pixels by a whole factor, to about ``side``; grey images become RGB, transparency is laid over white."""
    factor = max(1, round(side / max(images.shape[-2:])))
    images = images.detach().cpu().float().clamp(0, 1)
    if images.shape[1] == 4:
        images = 1 - images[:, 3:] * (1 - images[:, :3])
    return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1).expand(-1, 3, -1, -1)


def _show(axes: Axes, image: Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_axis_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_visible(False)  # else the layout measures what is not drawn


def _label_pair(axes: Axes, *labels: str, below: float, fontsize: float) -> None:
    """Write what the left and the right image show under them."""
    style: dict[str, Any] = {"fontsize": fontsize, "color": QUIET, "ha": "center", "va": "top"}
    for position, label in zip((0.25, 0.75), labels, strict=True):
        axes.text(position, -below, label.replace("$", r"\$"), transform=axes.transAxes, **style)


def _wrapped(title: str, figure: Figure) -> str:
    """Break the lines of a title where a figure ends."""
    letters = int(_LETTERS * figure.get_figwidth())
    lines = [line for part in title.splitlines() for line in textwrap.wrap(part, letters)]
    return "\n".join(lines).replace("$", r"\$")


def _shortened(text: str, length: int) -> str:
    """Cut the middle out of a long text.

    Example:
        >>> _shortened("patients/0012/scan_0003.png", 15)
        'patient…003.png'
    """
    if len(text) <= length:
        return text
    end = length // 2
    return f"{text[: length - 1 - end]}…{text[-end:]}"


_DIRECTIONS = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))


def label_points(
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    *,
    colours: Mapping[str, str] | None = None,
    others: Sequence[tuple[float, float]] = (),
) -> list[Text]:
    """Write each label beside its point, where it covers neither a point nor another label.

    Places are tried from near to far in eight directions; a label that ends up farther off is tied to its point by a
    line. Where everything is taken the label stays beside its point, on top of another one.

    Args:
        axes: axes of a figure whose layout and limits are otherwise final.
        points: ``{label: (x, y)}`` in data coordinates.
        colours: of the labels, by label; dark grey where there is none.
        others: points without a label, which none covers either.

    Example:
        >>> axes = Figure().subplots()
        >>> near, far = label_points(axes, {"here": (0.50, 0.5), "there": (0.51, 0.5)})
        >>> bool(near.get_window_extent().overlaps(far.get_window_extent()))
        False
    """
    figure = cast(Figure, axes.get_figure(root=True))
    if not isinstance(figure.canvas, FigureCanvasAgg):
        FigureCanvasAgg(figure)  # measures texts with one renderer, not with a new one for each
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)  # without which no extent is known
    axes.viewLim  # noqa: B018 (limits that follow from what is drawn are set where they are asked for)
    labels: list[Text] = []
    drawn = axes.transData.transform([*points.values(), *others])
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in drawn]
    for label, point in points.items():
        for reach, (right, up) in product((9, 20, 32, 46, 60, 80, 105), _DIRECTIONS):
            text = _text_beside(axes, label, point, right * reach, up * reach)
            box = text.get_window_extent()
            if not box.count_overlaps(taken) and axes.bbox.count_contains(box.corners()) == 4:
                break
            text.remove()
        else:  # a crowd: rather a label on top of another than a point without one
            reach, text = 0, _text_beside(axes, label, point, 9, 0)
            box = text.get_window_extent()
        text.set_color((colours or {}).get(label, INK))
        labels.append(text)
        taken.append(box)
        if reach > 9:
            line = {"arrowstyle": "-", "color": QUIET, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
            tip = (right * reach, up * reach)
            axes.annotate("", point, xytext=tip, textcoords="offset points", arrowprops=line).set_in_layout(False)
    return labels


def _text_beside(axes: Axes, label: str, point: tuple[float, float], right: int, up: int) -> Text:
    """Write a label a number of typographic points away from a point of the chart."""
    shifted = offset_copy(axes.transData, fig=axes.get_figure(root=True), x=right, y=up, units="points")
    horizontal = "center" if right == 0 else "left" if right > 0 else "right"
    vertical = "center" if up == 0 else "bottom" if up > 0 else "top"
    text = axes.text(*point, label, transform=shifted, fontsize=8.5, color=INK, ha=horizontal, va=vertical)
    text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # readable on top of a line
    text.set_in_layout(False)
    return text


def training_curves(
    losses: Sequence[float],
    *,
    validation: Mapping[int, float] | None = None,
    round_epochs: float | None = None,
    weights: Mapping[int, Sequence[float]] | None = None,
    skip_rate: Sequence[float] | None = None,
    loss_by_timestep: Sequence[float] | None = None,
    threshold: float | None = None,
    num_timesteps: int = 1000,
) -> Figure:
    """Plot the losses by epoch and, where anti-gradient control ran, skip rate or weights, and loss by timestep.

    Args:
        losses: mean training loss of each epoch.
        validation: loss of held-out images by the epoch after which it was measured, 1 … .
        round_epochs: epochs between two averagings of the shards, which are marked on the axis of epochs.
        weights: by the epoch after which they are, 1 …, the mean weight of all training images, and that of the tenth
            that counts least; shown in the place of the skip rate.
        skip_rate: share of samples skipped in equal bins of the timestep, NaN where none was seen.
        loss_by_timestep: mean loss in equal bins of the timestep, NaN where none was seen.
        threshold: the threshold of anti-gradient control, for the title.
        num_timesteps: number of timesteps that the bins divide.

    Returns:
        The figure, with one panel for each curve that was given.
    """
    wanted = [True, weights is not None or skip_rate is not None, loss_by_timestep is not None]
    figure = _figure(4.2 * sum(wanted), 3.5)
    panels = iter(figure.subplots(1, sum(wanted), squeeze=False).flat)
    panel = _chart(next(panels), title="Loss by epoch", xlabel="epoch", ylabel="mean loss of all samples")
    window = 1 + 2 * (len(losses) // 50)
    epochs = range(1, len(losses) + 1)
    if window > 1:
        panel.plot(epochs, losses, color="#c9c9c9", linewidth=0.8)
    dots: dict[str, Any] = {"marker": "" if window > 1 else "o", "markersize": 4}
    panel.plot(epochs, _smooth(losses, window), color=GENERATED, linewidth=1.4, label="training images", **dots)
    held_out = {epoch: value for epoch, value in (validation or {}).items() if isfinite(value)}
    if held_out:
        dots = {"marker": "s", "markersize": 3.5}
        panel.plot([*held_out], [*held_out.values()], color=CONTROL, linewidth=1.2, label="held-out images", **dots)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    known = [value for value in (*losses, *held_out.values()) if isfinite(value)]
    if known and 0 < 5 * min(known) < max(known):
        _log_axis(panel)
    if round_epochs and len(losses) / round_epochs <= 60:
        ends = [round_epochs * number for number in range(1, int(len(losses) / round_epochs) + 1)]
        marks: dict[str, Any] = {"transform": panel.get_xaxis_transform(), "color": INK, "linestyle": "", "marker": "|"}
        panel.plot(ends, [0.0] * len(ends), markersize=9, clip_on=False, label="shards averaged", **marks)
    if len(panel.lines) > 1:
        panel.legend(frameon=False, fontsize=8, loc="upper right")
    if weights is not None:
        panel = _chart(next(panels), title="Weights of AGC by record", xlabel="epoch", ylabel="weight")
        courses = (("mean of all training images", INK), ("mean of the tenth that counts least", GENERATED))
        dots = {"marker": "" if len(weights) > 50 else "o", "markersize": 4}
        for (label, colour), course in zip(courses, zip(*weights.values(), strict=True), strict=True):
            panel.plot([*weights], course, color=colour, linewidth=1.4, label=label, **dots)
        panel.yaxis.set_major_formatter(_percent)
        panel.set_ylim(0, 1.3)  # with room for the legend
        panel.set_yticks([0, 0.25, 0.5, 0.75, 1])
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.legend(frameon=False, fontsize=8, loc="upper right")
    elif skip_rate is not None:
        title = "Skipped by AGC" + ("" if threshold is None else f", threshold {threshold:g}")
        panel = _chart(next(panels), title=title, xlabel="timestep (1: least noise)", ylabel="share of samples skipped")
        panel.stairs(skip_rate, _edges(skip_rate, num_timesteps), fill=True, color=GENERATED)
        panel.yaxis.set_major_formatter(_percent)
        panel.set_ylim(0, max(0.01, panel.get_ylim()[1]))
        panel.xaxis.set_major_locator(MaxNLocator(5))
    if loss_by_timestep is not None:
        panel = _chart(
            next(panels), title="Training loss by timestep", xlabel="timestep (1: least noise)", ylabel="mean loss"
        )
        panel.stairs(
            loss_by_timestep, _edges(loss_by_timestep, num_timesteps), baseline=None, color=GENERATED, linewidth=1.4
        )
        panel.xaxis.set_major_locator(MaxNLocator(5))
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
    """Plot how training losses fall below those of unseen images, and the share that anti-gradient control skips.

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
    figure = _figure(12.6 if skips else 9.2, 3.4)
    losses, ratios, *others = figure.subplots(1, 2 + skips)
    window = 1 + 2 * (len(training_loss) // 50)
    epochs = [(row + 0.5) * epochs_per_row for row in range(len(training_loss))]
    _chart(losses, title="Loss, mean of all timesteps", xlabel="epoch", ylabel="loss")
    for label, rows, colour in (("unseen images", unseen_loss, CONTROL), ("training images", training_loss, GENERATED)):
        losses.plot(
            epochs, _smooth(_forward_filled(rows).nanmean(1).tolist(), window), color=colour, linewidth=1.6, label=label
        )
    losses.legend(frameon=False, fontsize=8.5, labelcolor="linecolor")
    _log_axis(losses)
    for panel in others:
        _chart(panel, title="Skipped by anti-gradient control", xlabel="epoch", ylabel="share of samples skipped")
        panel.plot(
            epochs, _smooth(_forward_filled(skip_rate).nanmean(1).tolist(), window), color=GENERATED, linewidth=1.6
        )
        panel.yaxis.set_major_formatter(_percent)
        panel.set_ylim(0, max(0.01, panel.get_ylim()[1]))
    _chart(ratios, title="Training loss / unseen loss", xlabel="epoch", ylabel="timestep (1: least noise)")
    ratios.set_facecolor("#dddddd")  # where nothing was measured
    extent = (0.0, float(len(training_loss) * epochs_per_row), 0.0, float(num_timesteps))
    image = ratios.imshow(
        _without_holes(training_loss / unseen_loss).T.numpy(),
        origin="lower",
        aspect="auto",
        extent=extent,
        cmap="viridis",
        vmin=0,
        vmax=1.2,
    )
    ratios.grid(visible=False)
    bar = figure.colorbar(image, ax=ratios, ticks=[0, 0.2, 0.4, 0.6, 0.8, 1, 1.2])
    bar.set_label(
        "1: no memorization; below: training images\nare denoised better than unseen ones", fontsize=8, color=INK
    )
    bar.ax.tick_params(labelsize=8)
    return figure


def memorized_quantity_curve(
    generated: Mapping[float, float], control: Mapping[float, float], *, k: int = 50
) -> Figure:
    """Plot the memorized quantity as a share of the images against the threshold.

    Args:
        generated: ``{threshold: share}`` of the generated images.
        control: the same for held-out real images, which cannot have been memorized.
        k: number of nearest training images in the mean, for the label.
    """
    figure = _figure(5.6, 3.8)
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
    figure.legend(**_BELOW, ncols=2, labelcolor="linecolor")
    return figure


BINS = 50  # of a histogram of ratios
_BELOW: dict[str, Any] = {"frameon": False, "fontsize": 8.5, "loc": "outside lower center"}  # a legend
_COLOURS = (
    GENERATED, CONTROL, "#5b7f3a", "#8a4fa3", "#b08a00", "#00877a", "#c2417c", "#555555", "#7a4a21", "#3f51b5",
)  # fmt: skip
_MARKERS = "osD^vPX<>p"


@dataclass(frozen=True)
class RunPoint:
    """A run as a chart of several shows it.

    Attributes:
        fid: Its FID; NaN where none was measured.
        shares: A share of its images for each panel.
        course: FID and shares at earlier steps, in their order, where it was evaluated on its way.
    """

    fid: float
    shares: Sequence[float]
    course: Sequence[tuple[float, Sequence[float]]] = ()


def runs_against_fid(
    runs: Mapping[str, RunPoint], *, control: RunPoint, measures: Sequence[str], training_fid: float | None = None
) -> Figure:
    """Show quality against memorization of several runs, with a panel for each measure of memorization.

    Args:
        runs: By name. Up to ten have a colour and their names at their points; of more, points have numbers.
        control: Held-out real images, as dashed lines: no run can be expected beyond them.
        measures: Names of the shares, one for each panel.
        training_fid: FID of the training images themselves, what copying alone would give, as a dotted line.

    Returns:
        The figure. Where FID was not measured, the panels show shares alone, run by run.

    Example:
        >>> runs = {"plain": RunPoint(1.4, [0.9]), "protected": RunPoint(3.0, [0.0], course=[(9.0, [0.0])])}
        >>> figure = runs_against_fid(runs, control=RunPoint(0.6, [0.01]), measures=["copies"])
        >>> [text.get_text() for text in figure.axes[0].texts[:2]]
        ['plain', 'protected']
    """
    if not isfinite(control.fid) or not all(isfinite(run.fid) for run in runs.values()):
        return _shares_of_runs(runs, control=control, measures=measures)
    crowd = len(runs) > len(_COLOURS)
    height = max(4.4, 1.2 + 0.135 * len(runs)) if crowd else 4.4
    width = 4.6 * len(measures) + (0.9 + 0.062 * max(map(len, runs)) if crowd else 0)
    figure = _figure(width, height)
    colours = {name: GENERATED if crowd else _COLOURS[n] for n, name in enumerate(runs)}
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    figure.suptitle(
        "Quality against memorization: lower left is better, down to the held-out images", fontsize=10, color=INK
    )
    for number, (panel, measure) in enumerate(zip(panels, measures, strict=True)):
        _chart(panel, xlabel="FID to held-out images", ylabel=textwrap.fill(measure, 36))
        dashed: dict[str, Any] = {"color": QUIET, "linewidth": 1.2, "linestyle": (0, (4, 3))}
        panel.axvline(control.fid, **dashed)
        panel.axhline(control.shares[number], label="held-out real images (control)", **dashed)
        if training_fid is not None:
            label = "FID of the training images themselves"
            panel.axvline(training_fid, color=QUIET, linewidth=1.2, linestyle=":", label=label)
        marks = [(control.fid, control.shares[number]), (training_fid or 0.0, 0.0)]
        for (name, run), marker in zip(runs.items(), _MARKERS * ceil(len(runs) / len(_MARKERS)), strict=False):
            course = [(fid, shares[number]) for fid, shares in run.course]
            line = [*course, (run.fid, run.shares[number])]
            marks += line
            style: dict[str, Any] = {"color": colours[name], "marker": "o" if crowd else marker}
            panel.plot(*zip(*line, strict=True), markersize=3, linewidth=1, alpha=0.45, **style)
            panel.plot(*line[-1], markersize=7, linestyle="", label=None if crowd else name, **style)
        right, top = (max(values) for values in zip(*marks, (0.1, 0.02), strict=True))
        panel.set(xlim=(0, 1.15 * right), ylim=(-0.04 * top, 1.12 * top))
        panel.yaxis.set_major_formatter(_percent)
    if crowd:
        names = "\n".join(f"{number:\u2007>2}  {label}" for number, label in enumerate(runs, 1))
        panels[-1].text(1.02, 1, names, transform=panels[-1].transAxes, fontsize=7.5, color=INK, va="top")
    lines = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    columns = 2 if len(measures) == 1 else 4
    figure.legend(lines.values(), lines, **_BELOW, ncols=columns)
    lay_out(figure)
    labels = {str(n) if crowd else name: name for n, name in enumerate(runs, 1)}
    for number, panel in enumerate(panels):
        places = {label: (runs[name].fid, runs[name].shares[number]) for label, name in labels.items()}
        courses = [(fid, shares[number]) for run in runs.values() for fid, shares in run.course]
        own = {label: colours[name] for label, name in labels.items()}
        label_points(panel, places, colours=own, others=courses)
    return figure


def _shares_of_runs(runs: Mapping[str, RunPoint], *, control: RunPoint, measures: Sequence[str]) -> Figure:
    """Show shares alone, a row for each run."""
    figure = _figure(2 + 0.07 * max(map(len, runs)) + 3.2 * len(measures), 1.5 + 0.3 * len(runs))
    panels = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    figure.suptitle("Memorization, without a measure of quality", fontsize=10, color=INK)
    for number, (panel, measure) in enumerate(zip(panels, measures, strict=True)):
        _chart(panel, xlabel=measure)
        shares = [run.shares[number] for run in runs.values()]
        panel.barh(range(len(runs)), shares, height=0.6, color=GENERATED)
        for row, share in enumerate(shares):
            panel.text(share, row, f" {_percent(share, 0)}", va="center", fontsize=8, color=INK)
        panel.axvline(
            control.shares[number], color=CONTROL, linewidth=1.4, linestyle=(0, (4, 3)), label="held-out real images"
        )
        panel.xaxis.set_major_formatter(_percent)
        panel.set_xlim(0, 1.18 * max(*shares, control.shares[number], 0.02))
    panels[0].set_yticks(range(len(runs)), list(runs))
    panels[0].set_ylim(len(runs) - 0.4, -0.6)
    figure.legend(*panels[0].get_legend_handles_labels(), **_BELOW)
    return figure


def shares(ratios: Tensor) -> Tensor:
    """Return the share of ratios in each of 50 equal steps from 0 to 1, float64.

    Example:
        >>> shares(torch.tensor([0.0, 0.01, 0.5, 1.0]))[[0, 25, 49]]
        tensor([0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """
    steps = (ratios.double() * BINS).floor().clamp(0, BINS - 1).long()
    return torch.bincount(steps, minlength=BINS).double() / len(ratios)


def ratio_histogram(
    ratios: Mapping[str, Tensor], *, threshold: float, label: str, end: float, title: str = ""
) -> Figure:
    """Show how many of generated and held-out images have which ratio, as shares on a logarithmic scale.

    Args:
        ratios: of the generated and perhaps of the held-out images.
        threshold: where the line stands.
        label: what the ratio is.
        end: where the scale ends; larger ratios are in the last step.
        title: how to read it.
    """
    figure = _figure(6.4, 3.8)
    axes = _chart(figure.subplots(), xlabel=label, ylabel=f"share of images in a step of {end / BINS:.2g}", grid=False)
    edges = torch.linspace(0, end, BINS + 1).tolist()
    axes.stairs(
        shares(ratios["generated"] / end), edges, fill=True, color=GENERATED, alpha=0.75, label="generated images"
    )
    if "held_out" in ratios:
        axes.stairs(shares(ratios["held_out"] / end), edges, color=CONTROL, linewidth=1.6, label="held-out images")
    axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"threshold {threshold:.2f}")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7 / max(map(len, ratios.values())), top=1.4)
    axes.set_xlim(0, end)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    figure.suptitle(textwrap.fill(title, 88), fontsize=9, color=INK)
    figure.legend(**_BELOW | {"fontsize": 8}, ncols=3)
    return figure


def selection_front(
    points: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
    *,
    courses: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    chosen: tuple[float, float] | None,
    controls: tuple[float | None, float | None],
    labels: tuple[str, str],
    titles: tuple[str, str] = ("", ""),
) -> Figure:
    """Draws what a search for a selection has tried: quality to the right, memorization upwards.

    Args:
        points: of all masks at all checkpoints.
        front: those that no other one dominates, in the order of the first figure.
        courses: by name, of what the search is compared with: for each training its points in the order of steps.
        chosen: the point that was chosen.
        controls: the two figures of held-out images, drawn as lines where they are known.
        labels: of the axes.
        titles: left and right above the chart, such as which side is better.

    Returns:
        The figure. An axis is logarithmic where its figures and its control are positive and more than 30 times apart.
    """
    figure = _figure(7.4, 4.8)
    axes = _chart(figure.subplots(), title=titles[0], xlabel=labels[0], ylabel=labels[1])
    axes.set_title(titles[1], fontsize=8.5, color=QUIET, loc="right")
    lines: dict[str, Any] = {"color": CONTROL, "linewidth": 1.2, "linestyle": (0, (4, 3))}
    if controls[0] is not None:
        axes.axvline(controls[0], **lines)
    if controls[1] is not None:
        axes.axhline(controls[1], **lines)
    if any(control is not None for control in controls):
        axes.plot([], [], label="held-out real images (control)", **lines)
    styles = ((INK, "s", "-"), ("#5b7f3a", "^", "-"), (QUIET, "D", ""))
    for (name, trials), (colour, marker, line) in zip(courses.items(), styles, strict=False):
        for number, course in enumerate(trials):
            axes.plot(
                *zip(*course, strict=True), color=colour, marker=marker, linestyle=line, markersize=4.5, linewidth=0.9,
                alpha=0.85, label=name if number == 0 else None,
            )  # fmt: skip
    if points:
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, s=16, color=GENERATED, alpha=0.35, linewidths=0, label="masks tried")
    if front:
        axes.plot(*zip(*front, strict=True), color=GENERATED, marker="o", markersize=6, linewidth=1.6, label="front")
    if chosen is not None:
        ring: dict[str, Any] = {"marker": "o", "markersize": 13, "markeredgewidth": 1.8, "markerfacecolor": "none"}
        axes.plot(*chosen, linestyle="", markeredgecolor=GENERATED, label="chosen", **ring)
    every = [*points, *(point for trials in courses.values() for course in trials for point in course)]
    for axis, figures, control in zip("xy", zip(*every, strict=True), controls, strict=True):
        lowest = min(figures if control is None else (*figures, control))
        if lowest > 0 and max(figures) > 30 * lowest:
            _log_axis(axes, axis=axis)
    figure.legend(**_BELOW, ncols=3)
    return figure


def effect_bars(
    names: Sequence[str], effects: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, note: str = ""
) -> Figure:
    """Draws the effect of switching on each of some groups, one panel for each figure.

    Args:
        names: of the groups, top to bottom.
        effects: by the name of a figure, the effect of each group and half the width of its interval; NaN where it is
            not known.
        note: above the first panel.

    Returns:
        The figure; effects whose interval holds 0 are pale.
    """
    figure = _figure(3.2 + 3.1 * len(effects), 1.1 + 0.24 * len(names))
    panels = figure.subplots(1, len(effects), squeeze=False, sharey=True)[0]
    for panel, (figure_name, (values, widths)) in zip(panels, effects.items(), strict=True):
        _chart(panel, title=note if panel is panels[0] else "", xlabel=figure_name)
        panel.grid(visible=False, axis="y")
        panel.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        panel.axvline(0, color=QUIET, linewidth=1)
        for row, (value, width) in enumerate(zip(values, widths, strict=True)):
            if isfinite(value):
                alpha = 1.0 if isfinite(width) and abs(value) > width else 0.4
                panel.barh(row, value, height=0.62, color=GENERATED, alpha=alpha)
            if isfinite(value) and isfinite(width):
                panel.plot([value - width, value + width], [row, row], color=INK, linewidth=1.1)
        panel.xaxis.set_major_locator(MaxNLocator(5))
    panels[0].set_yticks(range(len(names)), list(names))
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")


def _chart(axes: Axes, *, title: str = "", xlabel: str, ylabel: str = "", grid: bool = True) -> Axes:
    """Give axes the look that all charts share."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(xlabel, fontsize=8.5, color=INK)
    axes.set_ylabel(ylabel, fontsize=8.5, color=INK)
    axes.tick_params(labelsize=8, colors=QUIET, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    if grid:
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    return axes


def _percent(share: float, _position: float) -> str:
    return f"{100 * share:.3g}%"


def _log_axis(axes: Axes, *, axis: str = "y") -> None:
    axes.set(**{f"{axis}scale": "log"})
    scale = axes.xaxis if axis == "x" else axes.yaxis
    scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
    scale.set_major_formatter("{x:g}")
    scale.set_minor_formatter(NullFormatter())


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over a window around each value, shorter at the ends."""
    half = window // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _forward_filled(rows: Tensor) -> Tensor:
    """Fill what was not measured, ``(n, bins)``, from the row before."""
    rows = rows.clone()
    for before, row in pairwise(rows):
        row[:] = torch.where(row.isnan(), before, row)
    return rows


def _without_holes(rows: Tensor) -> Tensor:
    """Fill what was not measured, ``(n, bins)``, from the row before, else from the next one that knows.

    Example:
        >>> _without_holes(torch.tensor([[torch.nan, 1.0], [2.0, torch.nan], [torch.nan, 3.0]])).tolist()
        [[2.0, 1.0], [2.0, 1.0], [2.0, 3.0]]
    """
    return _forward_filled(_forward_filled(rows).flip(0)).flip(0)


def _edges(bins: Sequence[float], num_timesteps: int) -> list[float]:
    return torch.linspace(0, num_timesteps, len(bins) + 1).tolist()
