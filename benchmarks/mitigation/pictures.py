"""The picture: memorized fraction against FID, with the course of plain training as the line to beat."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.mitigation.points import Point
from benchmarks.mitigation.summary import STOPPED, summarize
from lightning_iet.tools.figures import CONTROL, DPI, GENERATED, INK, QUIET, save_figure
from lightning_iet.tools.labels import label_points

Line = Mapping[str, Any]


def draw_pictures(points: Sequence[Point], folder: Path) -> list[Path]:
    """Draw ``pareto_SETTING.png`` for each setting; returns the files."""
    lines = summarize(points)
    files = []
    for setting in dict.fromkeys(point["setting"] for point in points):
        file = folder / f"pareto_{setting}.png"
        save_figure(pareto([line for line in lines if line["setting"] == setting], title=setting), file)
        files.append(file)
    return files


def pareto(lines: Sequence[Line], *, title: str) -> Figure:
    """Draw every method at its greatest length over the course of plain training; means over seeds."""
    plain = sorted((line for line in lines if line["row"] == "plain"), key=lambda line: line["length"])
    longest = plain[-1]["length"]
    methods = [line for line in lines if line["row"] not in ("plain", *STOPPED) and line["row"] != "plain_x4"]
    methods = [
        line for line in methods if line["length"] == max(m["length"] for m in methods if m["row"] == line["row"])
    ]
    figure = Figure(figsize=(10, 6.4), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.plot([line["fid"] for line in plain], [line["memorized_fraction"] for line in plain], color=INK, marker="o",
              markersize=4, linewidth=1.2, label=f"plain training, to {longest:g} × the best stopping point")  # fmt: skip
    for line in methods:
        x, y = line["fid"], line["memorized_fraction"]
        spread = {name: [[line[name] - line[f"{name}_low"]], [line[f"{name}_high"] - line[name]]]
                  for name in ("fid", "memorized_fraction")}  # fmt: skip
        axes.errorbar(x, y, xerr=spread["fid"], yerr=spread["memorized_fraction"], color=GENERATED, marker="o",
                      markersize=6, elinewidth=0.7, alpha=0.9)  # fmt: skip
    axes.axvline(
        plain[0]["fid_control"], color=CONTROL, linewidth=1.2, linestyle=(0, (4, 3)), label="held-out real images"
    )
    axes.axvline(
        plain[0]["fid_train"], color=QUIET, linewidth=1.2, linestyle=":", label="the training images themselves"
    )
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.01, linscale=0.6)
    axes.set_ylim(bottom=-0.002)
    axes.set_title(
        f"{title}: memorization against quality, means over seeds (lower left is better)", fontsize=10, loc="left"
    )
    axes.set_xlabel("FID to held-out images", fontsize=9)
    axes.set_ylabel("memorized fraction of the drawn images", fontsize=9)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    axes.tick_params(labelsize=8, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5, loc="upper right")
    named = {line["label"]: (line["fid"], line["memorized_fraction"]) for line in methods}
    named |= {f"plain, {line['length']:g} ×": (line["fid"], line["memorized_fraction"]) for line in plain}
    for text in label_points(axes, named):
        text.set_fontsize(7.5)
    return figure
