"""The picture: memorized fraction against FID, with the course of plain training as the line to beat."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.mitigation.points import row_named
from benchmarks.mitigation.summary import STOPPED, Line, at_greatest_length
from benchmarks.mitigation.tables import README_ROWS
from lightning_iet.plots import CONTROL, DPI, GENERATED, INK, QUIET, label_points, save_figure


def draw_pictures(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Draw ``pareto_SETTING.png`` for each setting that has plain training to compare with; returns the files."""
    files = []
    for setting in dict.fromkeys(line["setting"] for line in lines if line["row"] == "plain"):
        file = folder / f"pareto_{setting}.png"
        mine = [line for line in lines if line["setting"] == setting]
        save_figure(courses(mine, title=setting) if "copies_repeated" in mine[0] else pareto(mine, title=setting), file)
        files.append(file)
    return files


def pareto(lines: Sequence[Line], *, title: str) -> Figure:
    """Draw every method at its greatest length over the course of plain training; means over seeds.

    Left the memorized fraction, right MQ at 0.15, which tells apart what the fraction calls 0. Numbers are explained
    beside the panels, plain training's by its length.
    """
    course = sorted((line for line in lines if line["row"] == "plain"), key=lambda line: line["length"])
    methods = [line for line in at_greatest_length(lines) if _is_method(line["row"])]
    figure = Figure(figsize=(15, 6.4), dpi=DPI, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, what in ((left, "memorized_fraction", "memorized fraction"), (right, "mq_0.15", "MQ < 0.15")):
        _panel(axes, course, methods, name)
        axes.set_title(f"{title}: {what} against quality (lower left is better)", fontsize=10, loc="left", color=INK)
        axes.set_ylabel(f"{what} of the drawn images", fontsize=9, color=INK)
    names = "\n".join(f"{number:\u2007>2}  {line['label']}" for number, line in enumerate(methods, 1))
    right.text(1.02, 1, names, transform=right.transAxes, fontsize=8, color=INK, va="top")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower center", ncols=4)
    for axes, name in ((left, "memorized_fraction"), (right, "mq_0.15")):
        points = {str(number): (line["fid"], line[name]) for number, line in enumerate(methods, 1)}
        points |= {f"{line['length']:g} ×": (line["fid"], line[name]) for line in course}
        for text in label_points(axes, points):
            text.set_fontsize(7.5)
    return figure


def courses(lines: Sequence[Line], *, title: str) -> Figure:
    """Draw the course of each row of an uneven setting: FID against copies of the repeated images, means over seeds."""
    figure = Figure(figsize=(9, 6), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    rows = [line["row"] for line in at_greatest_length(lines) if line["row"] in README_ROWS]
    for row, color in zip(rows, ("#222222", "#1b7f3b", "#8a8a8a", "#c77b00", "#7b3fb5", "#0a62c4"), strict=False):
        course = sorted((line for line in lines if line["row"] == row), key=lambda line: line["length"])
        fid, share = _columns(course, "fid", "copies_repeated_half")
        label = f"{course[-1]['label']}: FID {fid[-1]:.1f}, {100 * share[-1]:.1f} % at {course[-1]['length']:g} ×"
        axes.plot(fid, share, color=color, marker="o", markersize=4, linewidth=1.4, label=label)
        axes.plot(fid[-1], share[-1], color=color, marker="o", markersize=8)
    axes.legend(frameon=False, fontsize=8.5, loc="upper right")
    control = lines[0]
    axes.axhline(control["copies_repeated_half_control"], color=CONTROL, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_yscale("symlog", linthresh=0.01, linscale=0.6)
    axes.set_ylim(-0.002, 1)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    axes.set_xlabel("FID to held-out images (left is better)", fontsize=9, color=INK)
    axes.set_ylabel("drawn images that copy a repeated training image, by d1/d2 < 1/2", fontsize=9, color=INK)
    lengths = " → ".join(f"{length:g}" for length in sorted({x["length"] for x in lines if x["length"] is not None}))
    axes.set_title(
        f"{title}: the course of training, {lengths} × (large dot); lower left is better; dashed: held-out images",
        fontsize=10, loc="left", color=INK,
    )  # fmt: skip
    axes.tick_params(labelsize=8, which="both", colors=QUIET, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _panel(axes: Axes, course: Sequence[Line], methods: Sequence[Line], name: str) -> None:
    longest = course[-1]["length"]
    label = f"plain training, stopped at … {longest:g} × the least held-out loss"
    axes.plot(*_columns(course, "fid", name), color=INK, marker="o", markersize=4, linewidth=1.2, label=label)
    style = {"color": GENERATED, "marker": "o", "markersize": 6, "linestyle": "", "elinewidth": 0.6}
    spread = {column: _spread(methods, column) for column in ("fid", name)}
    label = "other methods, with 95 % intervals over seeds"
    axes.errorbar(*_columns(methods, "fid", name), xerr=spread["fid"], yerr=spread[name], label=label, **style)
    control = course[0]
    label = f"held-out real images (FID {control['fid_control']:.1f}, far to the left)"
    axes.axhline(control[f"{name}_control"], color=CONTROL, linewidth=1.2, linestyle=(0, (4, 3)), label=label)
    axes.axvline(
        control["fid_train"], color=QUIET, linewidth=1.2, linestyle=":", label="the training images themselves"
    )
    axes.set_xscale("log")
    known = [control["fid_train"], *(line["fid"] for line in (*course, *methods))]
    axes.set_xlim(0.85 * min(known), 1.25 * max(known))
    axes.set_yscale("symlog", linthresh=0.01, linscale=0.6)
    axes.set_ylim(bottom=-0.002)
    axes.set_xlabel("FID to held-out images", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    axes.tick_params(labelsize=8, which="both", colors=QUIET, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)


def _is_method(row: str) -> bool:
    """Whether it belongs beside the course of plain training: not that itself, nor what saw fewer images."""
    return row not in STOPPED and not row_named(row).is_plain and row_named(row).train_factor == 1


def _columns(lines: Sequence[Line], *names: str) -> list[list[float]]:
    return [[line[name] for line in lines] for name in names]


def _spread(lines: Sequence[Line], name: str) -> list[list[float]]:
    return [
        [max(0, line[name] - line[f"{name}_low"]) for line in lines],
        [max(0, line[f"{name}_high"] - line[name]) for line in lines],
    ]
