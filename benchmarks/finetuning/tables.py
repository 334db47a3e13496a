"""Tables in Markdown, and their places in docs."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.finetuning.summary import Line
from benchmarks.mitigation.tables import interval, markdown

PAGE = Path("docs/finetuning-benchmark.md")
_COLUMNS = (
    "what trains", "share", "FID", "MQ < 0.15", "d1/d2 < 1/2", "memorized (< 1/3)", "training images extracted",
    "membership AUC",
)  # fmt: skip
_SHARES = ("copies_half", "memorized_fraction", "copied_images")


def tables_of(lines: Sequence[Line]) -> dict[str, str]:
    """Three tables for each setting: at the end, stopped in time, and against full fine-tuning of equal quality."""
    tables = {}
    for setting in dict.fromkeys(line["setting"] for line in lines):
        at = {
            kind: [line for line in lines if line["setting"] == setting and line["at"] == kind]
            for kind in ("end", "stopped", "equal")
        }
        tables[f"finetuning {setting}"] = at_the_end(at["end"])
        tables[f"finetuning {setting} stopped"] = stopped_in_time(at["stopped"])
        tables[f"finetuning {setting} equal quality"] = at_equal_quality(at["equal"])
    return tables


def at_the_end(lines: Sequence[Line]) -> str:
    """Every row at its greatest length, and the control."""
    cells = [
        [
            line["label"], _share(line), interval(line, "fid", digits=1), interval(line, "mq_0.15", share=True),
            *(f"{100 * line[name]:.1f} %" for name in _SHARES),
            interval(line, "membership_auc"), f"{line['seconds']:.0f}",
        ]
        for line in lines
    ]  # fmt: skip
    return markdown([*_COLUMNS, "seconds"], [*cells, [*_control(lines[0]), ""]])


def stopped_in_time(lines: Sequence[Line]) -> str:
    """Every row at its best checkpoint that copies no more than held-out images do."""
    cells = [
        [
            line["label"], _share(line), interval(line, "fid", digits=1), interval(line, "mq_0.15", share=True),
            *(f"{100 * line[name]:.1f} %" for name in _SHARES),
            interval(line, "membership_auc"),
            f"{line['length']:.2f} ×" + (f"; none in {line['never']:g} runs" if line["never"] else ""),
        ]
        for line in lines
    ]  # fmt: skip
    return markdown([*_COLUMNS, "length"], [*cells, [*_control(lines[0]), ""]])


def at_equal_quality(lines: Sequence[Line]) -> str:
    """Every row's end beside full fine-tuning stopped at the same FID."""
    header = ["what trains", "FID", "MQ < 0.15: row / full there; difference", "membership AUC: row / full there"]
    cells = []
    for line in lines:
        if "mq_0.15_full" not in line:
            found = {"never as good": line["better"], "better from the start": line["worse"]}
            why = ", ".join(f"{what} in {n:g} of {line['runs']:g} runs" for what, n in found.items() if n)
            cells.append([line["label"], "", f"full fine-tuning: {why}", ""])
            continue
        own, full = 100 * line["mq_0.15"], 100 * line["mq_0.15_full"]
        low, high = (100 * line[f"mq_0.15_difference_{end}"] for end in ("low", "high"))
        cells.append([
            line["label"], f"{line['fid']:.1f}",
            f"{own:.1f} / {full:.1f} %; {own - full:+.1f} ({low:+.1f} to {high:+.1f})",
            f"{line['membership_auc']:.2f} / {line['membership_auc_full']:.2f}",
        ])  # fmt: skip
    return markdown(header, cells)


def _control(line: Line) -> list[str]:
    shares = [f"*{100 * line[f'{name}_control']:.1f} %*" for name in ("mq_0.15", *_SHARES)]
    return ["*held-out images*", "", f"*{line['fid_control']:.1f}*", *shares, "*0.5: chance*"]


def _share(line: Line) -> str:
    return f"{100 * line['share']:.3g} %"
