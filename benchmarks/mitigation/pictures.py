"""The picture: memorized fraction against FID, with the course of plain training as the line to beat."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.mitigation.points import row_named
from benchmarks.mitigation.summary import STOPPED, Line, at_greatest_length
from benchmarks.mitigation.tables import README_ROWS
from lightning_iet.plots import CONTROL, DPI, GENERATED, INK, QUIET, label_points, save_figure

_NAMED = {
    "plain_with_unseen": "plain, with 64 more images",
    "dropout_flips": "dropout and flips",
    "half_width": "a quarter of the size",
    "iet_4": "IET",
    "agc_0.5": "AGC 0.5",
    "agc_0.9": "AGC 0.9",
    "iet_agc_4": "IET-AGC",
    "iet_agc_10": "IET-AGC, 10 shards",
    "anchored_64": "AGC, 64 unseen",
    "anchored_strict": "AGC 0.9, 64 unseen",
    "iet_agc_plus": "IET-AGC+",
    "randaugment": "RandAugment",
    "dp_sgd": "DP-SGD",
}
"""Short names of the rows that have one in a picture: one of each kind."""
_MEASURES = {
    "memorized_fraction": "images that are copies (memorized fraction)",
    "mq_0.15": "images unusually near to one training image (MQ < 0.15)",
}


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

    Above the memorized fraction, below MQ at 0.15, which tells apart what the fraction calls 0. Where there are many
    methods, one of each kind has its name, and further settings of it are pale. What draws worse than plain training
    ever did is named at the right edge.
    """
    course = sorted((line for line in lines if line["row"] == "plain"), key=lambda line: line["length"])
    methods = [line for line in at_greatest_length(lines) if _is_method(line["row"])]
    named = [line for line in methods if line["row"] in _NAMED or len(methods) <= len(_NAMED)]
    names = {line["row"]: _NAMED.get(line["row"], line["label"]) for line in named}
    worst = max(line["fid"] for line in course)
    beyond = [line for line in named if line["fid"] > worst]
    figure = Figure(figsize=(9, 11), dpi=DPI, facecolor="white", layout="constrained")
    lengths = f"{course[0]['length']:g} to {course[-1]['length']:g} times the length of least held-out loss"
    pale = "; pale: other settings of the methods, see the table" if len(named) < len(methods) else ""
    figure.suptitle(
        f"{title}: copies against quality, lower left is better; thin lines: 95 % intervals\n"
        f"black: plain training, stopped at {lengths}{pale}",
        fontsize=9.5, color=INK,
    )  # fmt: skip
    panels = dict(zip(("memorized_fraction", "mq_0.15"), figure.subplots(2, 1), strict=True))
    for name, axes in panels.items():
        _panel(axes, course, methods, named, name)
        axes.set_ylabel(_MEASURES[name], fontsize=9, color=INK)
        far = "\n".join(f"{names[line['row']]}: FID {line['fid']:.0f}, {100 * line[name]:.1f} % →" for line in beyond)
        axes.text(1, 0.98, far, transform=axes.transAxes, fontsize=8, color=GENERATED, ha="right", va="top")
    for name, axes in panels.items():  # last, for labels are placed where the layout has left the axes
        shown = [line for line in named if line not in beyond]
        points = {names[line["row"]]: (line["fid"], line[name]) for line in shown}
        lengths = {f"{line['length']:g} ×": (line["fid"], line[name]) for line in course[::-2]}
        others = [(line["fid"], line[name]) for line in methods if line["fid"] <= worst]
        others += _along(axes, [(line["fid"], line[name]) for line in course])
        colours = dict.fromkeys(points, GENERATED)
        for text in label_points(axes, lengths | points, colours=colours, others=others):
            text.set_fontsize(8)
    return figure


def courses(lines: Sequence[Line], *, title: str) -> Figure:
    """Draw the course of each row of an uneven setting: FID against copies of the repeated images, means over seeds."""
    figure = Figure(figsize=(9, 6), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    rows = [line["row"] for line in at_greatest_length(lines) if line["row"] in README_ROWS]
    ends, colours, lines_drawn = dict[str, tuple[float, float]](), dict[str, str](), list[list[tuple[float, float]]]()
    for row, color in zip(rows, ("#222222", "#1b7f3b", "#8a8a8a", "#c77b00", "#7b3fb5", "#0a62c4"), strict=False):
        course = sorted((line for line in lines if line["row"] == row), key=lambda line: line["length"])
        fid, share = _columns(course, "fid", "copies_repeated_half")
        axes.plot(fid, share, color=color, marker="o", markersize=4, linewidth=1.4)
        axes.plot(fid[-1], share[-1], color=color, marker="o", markersize=8)
        label = f"{fill(README_ROWS[row], 30)}\n{100 * share[-1]:.1f} %"
        ends[label], colours[label] = (fid[-1], share[-1]), color
        lines_drawn.append(list(zip(fid, share, strict=True)))
    share = lines[0]["copies_repeated_half_control"]
    axes.axhline(share, color=CONTROL, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.text(
        1.01, share, "held-out\nimages", transform=axes.get_yaxis_transform(), fontsize=8.5, color=CONTROL, va="center"
    )
    axes.set_yscale("symlog", linthresh=0.01, linscale=0.6)
    axes.set_ylim(-0.002, 0.5)
    axes.set_xlim(left=0.3 * min(fid for fid, _ in ends.values()))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    axes.set_xlabel("FID to held-out images (left is better)", fontsize=9, color=INK)
    axes.set_ylabel("drawn images that copy a repeated training image, by d1/d2 < 1/2", fontsize=9, color=INK)
    lengths = " → ".join(f"{length:g}" for length in sorted({x["length"] for x in lines if x["length"] is not None}))
    axes.set_title(
        f"{title}: the course of training, {lengths} × (large dot); lower left is better",
        fontsize=10, loc="left", color=INK,
    )  # fmt: skip
    axes.tick_params(labelsize=8, which="both", colors=QUIET, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    others = [point for line in lines_drawn for point in _along(axes, line)]
    label_points(axes, dict(sorted(ends.items(), key=lambda end: end[1])), colours=colours, others=others)
    return figure


def _panel(axes: Axes, course: Sequence[Line], methods: Sequence[Line], named: Sequence[Line], name: str) -> None:
    axes.plot(*_columns(course, "fid", name), color=INK, marker="o", markersize=4, linewidth=1.2)
    pale = [line for line in methods if line not in named]
    axes.plot(*_columns(pale, "fid", name), color="#d9b3a3", marker="o", markersize=4, linestyle="")
    spread = {column: _spread(named, column) for column in ("fid", name)}
    style = {"color": GENERATED, "ecolor": "#e6c3b5", "marker": "o", "markersize": 6, "linestyle": "", "elinewidth": 1}
    axes.errorbar(*_columns(named, "fid", name), xerr=spread["fid"], yerr=spread[name], zorder=2, **style)
    control = course[0]
    known = [control["fid_train"], *(line["fid"] for line in course)]
    axes.axhline(control[f"{name}_control"], color=CONTROL, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.axvline(control["fid_train"], color=QUIET, linewidth=1.2, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlim(0.85 * min(known), 1.1 * max(known))
    axes.set_yscale("symlog", linthresh=0.01, linscale=0.6)
    axes.set_ylim(-0.003, 1)
    axes.set_xlabel("FID to held-out images", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    axes.tick_params(labelsize=8, which="both", colors=QUIET, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    share, beside = control[f"{name}_control"], axes.get_yaxis_transform()
    held_out = f"held-out\nimages\n(FID {control['fid_control']:.1f})"
    axes.text(1.01, share, held_out, transform=beside, fontsize=8, color=CONTROL, va="center")
    above = axes.get_xaxis_transform()
    axes.text(
        control["fid_train"], 1.01, "the training images", transform=above, fontsize=8, color="#595959", ha="center"
    )


def _along(axes: Axes, line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return points all along a line that is drawn straight from point to point."""
    drawn = axes.transData.transform(line)
    steps = np.linspace(0, 1, 20)[:, None]
    between = np.concatenate([start + steps * (end - start) for start, end in pairwise(drawn)])
    return [(float(x), float(y)) for x, y in axes.transData.inverted().transform(between)]


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
