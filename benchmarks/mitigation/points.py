"""The results as a flat table: one line for each run and mark, read from and written to ``points.csv``."""

import csv
from pathlib import Path
from typing import Any

from benchmarks.mitigation.rows import ROWS, Row
from benchmarks.mitigation.runs import Results, Run
from lightning_iet.utilities.files import write_atomically

Point = dict[str, Any]
FILE = "points.csv"
_TEXT = ("setting", "row")


def collect(runs: list[Run], results: Results) -> list[Point]:
    """Points of all runs that have finished."""
    points = []
    for run in runs:
        result = results.find(run)
        for point in result["points"] if result else []:
            facts = {"setting": run.setting.name, "row": run.row.name, "seed": run.seed}
            control = {f"{name}_control": value for name, value in result["control"].items() if name != "fid_train"}
            shared = {"fid_train": result["control"]["fid_train"], "parameters": result["parameters"]}
            points.append({**facts, "length": point["mark"] / run.setting.stop, **point, **control, **shared})
    return points


def write_table(lines: list[dict[str, Any]], file: Path) -> None:
    """Write lines as CSV, floats to six digits, whole or not at all."""
    columns = list(dict.fromkeys(column for line in lines for column in line))
    with write_atomically(file) as path, path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: f"{v:.6g}" if isinstance(v, float) else v for name, v in line.items()} for line in lines
        )


def read_points(folder: Path) -> list[Point]:
    """Read them back.

    Raises:
        FileNotFoundError: if there are none.
    """
    file = folder / FILE
    if not file.exists():
        raise FileNotFoundError(
            f"Argument `out` expected a folder with {FILE}, but got '{folder}'. Run the preset first."
        )
    with file.open(newline="") as stream:
        return [_typed(line) for line in csv.DictReader(stream)]


def row_named(name: str) -> Row:
    """The row of that name."""
    return next(row for row in ROWS if row.name == name)


def _typed(line: dict[str, str]) -> Point:
    values = {name: text if name in _TEXT else float(text) for name, text in line.items() if text != ""}
    return values | {"seed": int(values["seed"]), "mark": int(values["mark"]), "steps": int(values["steps"])}
