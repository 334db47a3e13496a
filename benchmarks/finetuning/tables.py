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
_KINDS = ("repeated", "once")
_SHARES = ("copies_half", "memorized_fraction", "copied_images")


def tables_of(lines: Sequence[Line]) -> dict[str, str]:
    """Three tables for each setting: at the end, stopped in time, and against full fine-tuning of equal quality.

    Of an uneven one the first two are one table, with copies of repeated images apart from those of others.
    """
    tables = {}
    for setting in dict.fromkeys(line["setting"] for line in lines):
        at = {
            kind: [line for line in lines if line["setting"] == setting and line["at"] == kind]
            for kind in ("end", "stopped", "stopped_half", "equal")
        }
        if "copies_repeated" in at["end"][0]:
            tables[f"finetuning {setting}"] = uneven(at["end"], at["stopped"], at["stopped_half"])
            tables[f"finetuning {setting} equal quality"] = at_equal_quality(
                at["equal"], "memorized_fraction", "copies (d1/d2 < 1/3)"
            )
            continue
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
            f"{line['length']:.2f} ×" + _none(line),
        ]
        for line in lines
    ]  # fmt: skip
    return markdown([*_COLUMNS, "length"], [*cells, [*_control(lines[0]), ""]])


def uneven(lines: Sequence[Line], in_time: Sequence[Line], by_half: Sequence[Line]) -> str:
    """Rows of an uneven setting at their greatest length, and at their best checkpoint that does not copy.

    Args:
        lines: of the end.
        in_time: stopped before they copy by d1/d2 < 1/3.
        by_half: stopped before they copy by d1/d2 < 1/2.
    """
    header = [
        "what trains", "share", "FID at the end", "copies of repeated images, in brackets by d1/d2 < 1/2",
        "copies of others, in brackets the same", "nearest to a repeated image", "membership AUC: repeated / others",
        "FID, stopped before it copies", "the same by d1/d2 < 1/2", "seconds",
    ]  # fmt: skip
    cells = [
        [
            line["label"], _share(line), interval(line, "fid", digits=1), *_copies(line),
            f"{line['membership_auc_repeated']:.2f} / {line['membership_auc_once']:.2f}",
            *(f"{interval(early, 'fid', digits=1)}, at {early['length']:.2f} ×" + _none(early) for early in stops),
            f"{line['seconds']:.0f}",
        ]
        for line, *stops in zip(lines, in_time, by_half, strict=True)
    ]  # fmt: skip
    names = ("copies_repeated", "copies_repeated_half", "copies_once", "copies_once_half", "nearest_repeated")
    control = _copies({name: lines[0][f"{name}_control"] for name in names})
    cells.append([
        "*held-out images*", "", f"*{lines[0]['fid_control']:.1f}*", *(f"*{text}*" for text in control),
        "*0.5: chance*", "", "", "",
    ])  # fmt: skip
    return markdown(header, cells)


def at_equal_quality(lines: Sequence[Line], copies: str = "mq_0.15", words: str = "MQ < 0.15") -> str:
    """Every row's end beside full fine-tuning stopped at the same FID.

    Args:
        lines: of the summary.
        copies: the figure that counts copies.
        words: what the table calls it.
    """
    header = ["what trains", "FID", f"{words}: row / full there; difference", "membership AUC: row / full there"]
    cells = []
    for line in lines:
        if f"{copies}_full" not in line:
            found = {"never as good": line["better"], "better from the start": line["worse"]}
            why = ", ".join(f"{what} in {n:g} of {line['runs']:g} runs" for what, n in found.items() if n)
            cells.append([line["label"], "", f"full fine-tuning: {why}", ""])
            continue
        own, full = 100 * line[copies], 100 * line[f"{copies}_full"]
        low, high = (100 * line[f"{copies}_difference_{end}"] for end in ("low", "high"))
        cells.append([
            line["label"], f"{line['fid']:.1f}",
            f"{own:.1f} / {full:.1f} %; {own - full:+.1f} ({low:+.1f} to {high:+.1f})",
            f"{line['membership_auc']:.2f} / {line['membership_auc_full']:.2f}",
        ])  # fmt: skip
    return markdown(header, cells)


def _control(line: Line) -> list[str]:
    shares = [f"*{100 * line[f'{name}_control']:.1f} %*" for name in ("mq_0.15", *_SHARES)]
    return ["*held-out images*", "", f"*{line['fid_control']:.1f}*", *shares, "*0.5: chance*"]


def _copies(line: Line) -> list[str]:
    both = [f"{100 * line[f'copies_{kind}']:.1f} % ({100 * line[f'copies_{kind}_half']:.1f})" for kind in _KINDS]
    return [*both, f"{100 * line['nearest_repeated']:.0f} %"]


def _none(line: Line) -> str:
    return f"; none in {line['never']:g} runs" if line["never"] else ""


def _share(line: Line) -> str:
    return f"{100 * line['share']:.3g} %"
