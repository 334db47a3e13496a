"""Tables in Markdown, and their places in README and docs."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.mitigation.scoring import QUARTERS
from benchmarks.mitigation.summary import STOPPED, Line, at_greatest_length
from lightning_iet.utilities.files import write_atomically

PAGES = (
    Path("README.md"),
    Path("docs/benchmark.md"),
    Path("docs/uneven-benchmark.md"),
    Path("docs/explanation/anchored-agc.md"),
)
CHOSEN = {
    "in short": (
        "plain", "stopped_on_loss", "stopped_on_fid", "plain_with_unseen", "dropout_flips", "half_width", "iet_4",
        "agc_0.5", "agc_0.9", "iet_agc_4", "anchored_16", "iet_anchored", "dp_sgd",
    ),
    "anchored": (
        "plain", "stopped_on_loss", "stopped_on_fid", "plain_with_unseen", "agc_0.5", "agc_0.9", "iet_agc_4",
        "anchored_16", "anchored_64", "anchored_often", "anchored_strict", "iet_anchored",
    ),
}  # fmt: skip
"""Rows of the tables that leave some out."""
RIVALS = ("iet_4", "agc_0.9", "iet_agc_4", "anchored_16", "anchored_64", "iet_anchored")
"""Rows of the short tables at equal quality."""
README_ROWS = {
    "plain": "plain training",
    "agc_0.8": "anti-gradient control (AGC), as published",
    "record_draws_unseen": "AGC by sample records, suspects drawn less often",
    "found": "near-duplicates found and removed first",
    "found_record_draws_unseen": "both: removed, and suspects drawn less often",
}
"""Rows of README's table and of its picture, in words that need no other page."""
_PLACE = "<!-- table: {name} -->\n"
_END = "<!-- end of table -->"


def tables_of(lines: Sequence[Line], equals: Sequence[Line], in_time: Sequence[Line] = ()) -> dict[str, str]:
    """All tables that can be made of the summary, and of what is compared at equal quality or stopped in time."""
    tables = {}
    for setting in dict.fromkeys(line["setting"] for line in lines):
        mine = [line for line in lines if line["setting"] == setting]
        if "copies_repeated" in mine[0]:
            best = [line for line in in_time if line["setting"] == setting]
            tables[setting] = uneven(mine, best)
            tables[f"{setting} in short"] = gains(mine, best)
            tables[f"{setting} lengths"] = over_lengths(mine, "copies_repeated", "copies of repeated")
            continue
        if "copies_quarter_1" in mine[0]:
            tables[f"{setting} quarters"] = by_quarter(mine)
        tables[setting] = at_the_end(mine)
        for name, rows in CHOSEN.items():
            tables[f"{setting} {name}"] = at_the_end([line for line in mine if line["row"] in rows])
        tables[f"{setting} lengths"] = over_lengths(mine)
        rivals = [line for line in equals if line["setting"] == setting]
        tables[f"{setting} equal quality"] = against_stopping(rivals)
        short = [line for line in rivals if line["row"] in RIVALS]
        tables[f"{setting} equal quality in short"] = against_stopping(short)
    return tables


def at_the_end(lines: Sequence[Line]) -> str:
    """Every row at its greatest length, early stopping, and under them the controls."""
    last = at_greatest_length(lines)
    plain = next(line for line in last if line["row"] == "plain")
    columns: dict[str, Callable[[Line], str]] = {
        "method": lambda line: line["label"],
        "FID": lambda line: interval(line, "fid"),
        "memorized": lambda line: interval(line, "memorized_fraction", share=True) + _own_control(line, plain),
        "training images copied": lambda line: interval(line, "copied_images", share=True),
        "MQ < 0.15": lambda line: interval(line, "mq_0.15", share=True) + _own_control(line, plain, "mq_0.15"),
        "membership AUC": lambda line: interval(line, "membership_auc", digits=2),
        "time": lambda line: "–" if line["time"] is None else f"{line['time']:.2f}",
    }
    control = [
        "*held-out images*", f"*{plain['fid_control']:.2f}*", *(_italic(plain[f"{name}_control"]) for name in
        ("memorized_fraction", "copied_images", "mq_0.15")), "*0.5: chance*", "",
    ]  # fmt: skip
    training = ["*the training images*", f"*{plain['fid_train']:.2f}*", "*100 %*", "*100 %*", "*100 %*", "", ""]
    return markdown(list(columns), [*([cell(line) for cell in columns.values()] for line in last), control, training])


def gains(lines: Sequence[Line], best: Sequence[Line]) -> str:
    """What a user gains on an uneven setting: few rows, few columns, plain training stopped in time among them."""
    last = {line["row"]: line for line in at_greatest_length(lines) if line["row"] in README_ROWS}
    stopped = {line["row"]: line for line in best}
    plain = last.pop("plain")
    rows = [(README_ROWS["plain"], plain), ("the same, stopped before it copies", stopped["plain"])]
    rows += [(README_ROWS[name], line) for name, line in last.items()]
    cells = [[label, interval(line, "fid", digits=1), *_shares(line)] for label, line in rows]
    control = {name: plain[f"{name}_control"] for name in ("copies_repeated", "copies_once", "nearest_repeated")}
    cells.append(["*held-out images*", f"*{plain['fid_control']:.1f}*", *(f"*{text}*" for text in _shares(control))])
    header = ["method", "FID", "copies of repeated images", "copies of others", "nearest to a repeated image"]
    return markdown(header, cells)


def _shares(line: Line) -> list[str]:
    shares = [f"{100 * line[name]:.1f} %" for name in ("copies_repeated", "copies_once")]
    return [*shares, f"{100 * line['nearest_repeated']:.0f} %"]


def uneven(lines: Sequence[Line], best: Sequence[Line]) -> str:
    """Rows of an uneven setting at their end, and at their best checkpoint that copies no more than held-out images."""
    last = {line["row"]: line for line in at_greatest_length(lines) if line["row"] not in STOPPED}
    stopped = {line["row"]: line for line in best}
    plain = last["plain"]
    header = [
        "method", "FID at the end", "copies of repeated images, in brackets by d1/d2 < 1/2", "copies of others",
        "nearest to a repeated image", "membership AUC: repeated / others", "FID, stopped before it copies",
    ]  # fmt: skip
    cells = []
    for row, line in last.items():
        early = stopped[row]
        cells.append([
            line["label"],
            interval(line, "fid", digits=1),
            f"{100 * line['copies_repeated']:.1f} % ({100 * line['copies_repeated_half']:.1f})",
            f"{100 * line['copies_once']:.1f} %",
            f"{100 * line['nearest_repeated']:.0f} %",
            f"{line['membership_auc_repeated']:.2f} / {line['membership_auc_once']:.2f}",
            interval(early, "fid", digits=1) + (f"; copies in {early['never']} seeds" if early["never"] else ""),
        ])  # fmt: skip
    control = [
        "*held-out images*", f"*{plain['fid_control']:.1f}*",
        f"*{100 * plain['copies_repeated_control']:.1f} % ({100 * plain['copies_repeated_half_control']:.1f})*",
        f"*{100 * plain['copies_once_control']:.1f} %*", f"*{100 * plain['nearest_repeated_control']:.0f} %*",
        "*0.5: chance*", "",
    ]  # fmt: skip
    return markdown(header, [*cells, control])


def by_quarter(lines: Sequence[Line]) -> str:
    """Rows at 1 × and at their end, by quarters of the training set, the least typical images first."""
    last = [line for line in at_greatest_length(lines) if line["row"] not in STOPPED]
    shown = [
        line for end in last for line in lines if line["row"] == end["row"] and line["length"] in (1, end["length"])
    ]
    header = [
        "method", "FID", "MQ < 0.15", "copies by d1/d2 < 1/2, by quarter of the image copied",
        "drawn images by quarter of the nearest", "membership AUC by quarter",
    ]  # fmt: skip
    cells = [
        [
            f"{line['label']}, {line['length']:g} ×",
            interval(line, "fid", digits=1),
            f"{100 * line['mq_0.15']:.1f} %",
            _by_quarter(line, "copies_quarter_{}_half"),
            _by_quarter(line, "nearest_quarter_{}", digits=0),
            " / ".join(f"{line[f'membership_auc_quarter_{quarter}']:.2f}" for quarter in QUARTERS),
        ]
        for line in shown
    ]
    control = {name.removesuffix("_control"): share for name, share in last[0].items() if name.endswith("_control")}
    cells.append(
        [
            "*held-out images*",
            f"*{control['fid']:.1f}*",
            f"*{100 * control['mq_0.15']:.1f} %*",
            f"*{_by_quarter(control, 'copies_quarter_{}_half')}*",
            f"*{_by_quarter(control, 'nearest_quarter_{}', digits=0)}*",
            "*0.5: chance*",
        ]
    )
    return markdown(header, cells)


def _by_quarter(line: Line, name: str, *, digits: int = 1) -> str:
    return " / ".join(f"{100 * line[name.format(quarter)]:.{digits}f}" for quarter in QUARTERS) + " %"


def over_lengths(lines: Sequence[Line], share: str = "memorized_fraction", words: str = "memorized") -> str:
    """FID and a share of the drawn images of each row at each length."""
    lengths = sorted({line["length"] for line in lines if line["length"] is not None})
    found = {(line["row"], line["length"]): line for line in lines}
    rows = [line for line in at_greatest_length(lines) if line["row"] not in STOPPED]
    header = ["method", *(f"{length:g} ×: FID, {words}" for length in lengths)]
    cells = [
        [
            row["label"],
            *(_both(found[row["row"], length], share) if (row["row"], length) in found else "" for length in lengths),
        ]
        for row in rows
    ]
    return markdown(header, cells)


def against_stopping(lines: Sequence[Line]) -> str:
    """Every row at its greatest length beside plain training stopped at the same FID."""
    cells = []
    for line in at_greatest_length(lines):
        cell = [line["label"], f"{line['fid']:.2f}"]
        if "time" in line:
            cell += [_beside(line, name) for name in ("memorized_fraction", "mq_0.15")]
            cell += [f"{line['membership_auc']:.2f} / {line['membership_auc_plain']:.2f}", f"{line['time']:.1f}"]
        else:
            cell += [_incomparable(line), "", "", ""]
        cells.append(cell)
    header = [
        "method", "FID", "memorized: method / plain there; difference", "MQ < 0.15: the same",
        "membership AUC: method / plain", "times the compute",
    ]  # fmt: skip
    return markdown(header, cells)


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Put tables into the places that a text has for them.

    Raises:
        KeyError: for a place whose table there is not.
    """
    place = re.compile(r"<!-- table: (?P<name>[^\n]+?) -->\n.*?" + re.escape(_END), re.DOTALL)
    return place.sub(lambda found: f"{_PLACE.format(name=found['name'])}\n{tables[found['name']]}\n{_END}", text)


def fill_pages(root: Path, tables: Mapping[str, str], pages: Sequence[Path] = PAGES) -> list[Path]:
    """Renew the tables in README and docs; returns the files that changed."""
    changed = []
    for page in (root / page for page in pages):
        text = page.read_text(encoding="utf-8")
        filled = fill(text, tables)
        if filled != text:
            with write_atomically(page) as path:
                path.write_text(filled, encoding="utf-8")
            changed.append(page)
    return changed


def interval(line: Line, name: str, *, share: bool = False, digits: int = 2) -> str:
    """A mean and its interval; a share in per cent."""
    values = [line[f"{name}{suffix}"] for suffix in ("", "_low", "_high")]
    if share:
        mean, low, high = (f"{100 * value:.1f}" for value in values)
        return f"{mean} % ({low}–{high})"
    mean, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{mean} ({low}–{high})"


def _incomparable(line: Line) -> str:
    """Why there is no plain training of this quality to compare with."""
    found = {"never as good": line["better"], "better at 0.5 × already": line["worse"]}
    return "plain training: " + ", ".join(f"{what} in {n} of {line['seeds']} seeds" for what, n in found.items() if n)


def _both(line: Line, share: str) -> str:
    return f"{line['fid']:.2f}, {100 * line[share]:.1f} %"


def _beside(line: Line, name: str) -> str:
    mine, plain = 100 * line[name], 100 * line[f"{name}_plain"]
    low, high = (100 * line[f"{name}_difference_{end}"] for end in ("low", "high"))
    return f"{mine:.1f} / {plain:.1f} %; {mine - plain:+.1f} ({low:+.1f} to {high:+.1f})"


def _own_control(line: Line, plain: Line, name: str = "memorized_fraction") -> str:
    """The control of a row that was trained on other images than plain training, if it is another."""
    own, common = f"{100 * line[f'{name}_control']:.1f}", f"{100 * plain[f'{name}_control']:.1f}"
    return "" if own == common else f"; control {own} %"


def _italic(share: float) -> str:
    return f"*{100 * share:.1f} %*"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
