"""Compare runs: the quality and the memorization of each, in one table and one plot."""

import math
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_iet.evaluation.report import read_metrics
from lightning_iet.evaluation.verdict import near_threshold, telling_thresholds
from lightning_iet.plots import RunPoint, runs_against_fid, save_figure
from lightning_iet.utilities.files import METRICS, check_writable, version_number, write_atomically, write_csv
from lightning_iet.utilities.text import percent, say, three_digits

_WIDTH = 20  # characters of a line of a run's name in a terminal, of 80 in all
Row: TypeAlias = dict[str, Any]


def compare(runs: Sequence[Path], *, out: Path = Path("comparison")) -> list[Row]:
    """Print one table over runs, and write ``comparison.csv``, ``comparison.md`` and ``comparison.png``.

    Each measure stands above that of held-out real images (the control), because on data of low variety even those lie
    close to a training image. Copies count near-duplicates among the training images once; the plot shows them and MQ
    against FID, and as a line the course of a run that was evaluated on its way (--evaluation.every_n_epochs).

    Args:
        runs: run folders, or folders that hold versions of a run (the newest finished one counts), or ``metrics.json``
            files.
        out: folder for the files; it is made if need be.

    Returns:
        One dict for each run, the rows of the CSV file.

    Raises:
        FileNotFoundError: a run does not exist or has no ``metrics.json``.
        ValueError: a ``metrics.json`` cannot be read, the runs were trained on different images or judged by different
            features, or nothing can be written to ``out``.

    Example:
        >>> compare([Path("runs/nowhere")])
        Traceback (most recent call last):
        ...
        FileNotFoundError: Argument `runs` expected folders of finished runs, but got 'runs/nowhere', which does ...
    """
    if not runs:
        raise ValueError("Argument `runs` expected at least one folder of a finished run, but got none.")
    out = Path(out)
    files = list(dict.fromkeys(_metrics_file(Path(run)) for run in runs))
    reports = {file: _read(file) for file in files}
    _check_comparable(reports)
    check_writable(out, argument="out", remedy="Give another folder with `--out`.")
    labels = dict(zip(_labels(files), files, strict=True))
    rows = [_row(label, file, reports[file]) for label, file in labels.items()]
    _write(rows, out, {label: _course(reports[file]) for label, file in labels.items()})
    Console().print(_table(rows))
    say(f"Written to {out}: comparison.csv, comparison.md, comparison.png", style="dim")
    return rows


# --- reading ---------------------------------------------------------------------------------------------------------


def _metrics_file(run: Path) -> Path:
    """Find the ``metrics.json`` of a path."""
    if not run.exists():
        raise FileNotFoundError(
            f"Argument `runs` expected folders of finished runs, but got '{run}', which does not exist."
        )
    if run.is_file():
        return run
    if (run / METRICS).is_file():
        return run / METRICS
    # By their number, others (run ids of Weights & Biases) by the time of the file.
    versions = sorted(run.glob(f"*/{METRICS}"), key=lambda file: (version_number(file.parent), file.stat().st_mtime))
    if not versions:
        raise FileNotFoundError(
            f"Argument `runs` expected folders of finished runs, but got '{run}' without a {METRICS}."
            " It is written at the end of `lightning-iet fit`."
        )
    return versions[-1]


def _read(file: Path) -> dict[str, Any]:
    try:
        report = read_metrics(file, kind="evaluation")
        for name, value in _row("", file, report).items():
            measured = ("memorized", "copied", "mq", "seconds", *(["fid"] if report["settings"]["features"] else []))
            of_a_measure = name.startswith(measured)
            if of_a_measure and not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"no figure for '{name}'")
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"no entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"Argument `runs` expected a {METRICS} written by `lightning-iet fit`, but got '{file}' ({problem})."
            " Train that run again, or leave it out."
        ) from error
    return report


def _check_comparable(reports: dict[Path, dict[str, Any]]) -> None:
    first, *others = reports
    for section, key, what in (
        ("data", "train_sha256", "runs trained on the same images"),
        ("data", "reference_sha256", "runs with the same reference images of FID"),
        ("settings", "features", "runs with FID in the same features"),
    ):
        for other in others:
            if reports[first][section][key] != reports[other][section][key]:
                raise ValueError(
                    f"Argument `runs` expected {what}, but got '{first.parent}' and '{other.parent}', which differ in"
                    " that. Train them with the same settings of data and features."
                )


def _labels(files: Sequence[Path]) -> list[str]:
    """The shortest end of each path that tells it from the others; ``version_3`` alone is no label."""
    folders = [file.parent.absolute() for file in files]
    plain = [f.parent.name if f.name.startswith("version_") else f.name for f in folders]
    if len(set(plain)) == len(plain):
        return plain
    for depth in range(2, max(len(f.parts) for f in folders)):
        labels = ["/".join(f.parts[-depth:]) for f in folders]
        if len(set(labels)) == len(labels):
            return labels
    return [str(file) for file in files]


def _row(label: str, file: Path, report: dict[str, Any]) -> Row:
    """A report as the columns of the CSV file."""
    generated, control, run, settings = (report[part] for part in ("generated", "control", "run", "settings"))
    row: Row = {"run": label, "shards": run["num_shards"], "threshold": run["threshold"]}
    row |= {"fid": generated["fid"], "fid_control": control["fid"], "fid_train": report["train"]["fid"]}
    row["memorized_fraction"] = generated["memorized_fraction"]
    row["memorized_fraction_control"] = control["memorized_fraction"]
    if "copied_fraction" in generated:
        row |= {
            f"copied_fraction{end}": part["copied_fraction"] for end, part in (("", generated), ("_control", control))
        }
    for threshold, share in generated["mq"].items():
        row |= {f"mq_{threshold}": share, f"mq_{threshold}_control": control["mq"][threshold]}
    row |= {name: run[name] for name in ("skip_rate", "epochs", "steps", "seconds")}
    row |= {name: settings[name] for name in ("num_samples", "sampler", "num_inference_steps", "use_ema", "features")}
    return row | {"folder": str(file.parent)}


def _course(report: dict[str, Any]) -> list[Row]:
    """The evaluations of a run before its last one."""
    return [point for point in report.get("course", ()) if point["step"] < report["run"]["steps"]]


# --- writing ---------------------------------------------------------------------------------------------------------


def _measure(rows: Sequence[Row]) -> tuple[str, str]:
    """The column of the plot, and its name: copies, or what all files have."""
    if all("copied_fraction" in row for row in rows):
        return "copied_fraction", "images that are copies (near-duplicates count once)"
    return "memorized_fraction", "memorized fraction"


def _write(rows: Sequence[Row], out: Path, courses: Mapping[str, Sequence[Row]]) -> None:
    write_csv(out / "comparison.csv", rows)
    with write_atomically(out / "comparison.md") as path:
        path.write_text(_markdown(rows))
    column, name = _measure(rows)
    near = near_threshold(_mq(rows[0], "_control"))

    def point(row: Row, course: Sequence[Row] = (), end: str = "") -> RunPoint:
        shares = [row[f"{column}{end}"], row[f"mq_{near}{end}"]]
        earlier = [(_number(at["fid"]), [at[column], at["mq"][near]]) for at in course]
        return RunPoint(_number(row[f"fid{end}"]), shares, earlier)

    figure = runs_against_fid(
        {row["run"]: point(row, courses[row["run"]]) for row in rows},
        control=point(rows[0], end="_control"),
        measures=[name, f"images unusually near to one training image (MQ < {near})"],
        training_fid=rows[0]["fid_train"],
    )
    save_figure(figure, out / "comparison.png")


def _number(value: float | None) -> float:
    """A figure as a number; NaN for one that was not measured."""
    return math.nan if value is None else value


def _mq(row: Row, end: str = "") -> dict[str, float]:
    """Shares by threshold of MQ, of a row of the CSV file."""
    found = {re.fullmatch(rf"mq_([\d.]+){end}", name): value for name, value in row.items()}
    return {match[1]: value for match, value in found.items() if match}


def _table(rows: Sequence[Row]) -> Table:
    title = "Quality and memorization of each run, above its held-out control"
    table = Table(title=title, caption=_caption(rows), caption_justify="left", box=box.SIMPLE, padding=0)
    header, *body = _cells(rows)
    for column, text in enumerate(header):
        # A figure keeps its column's width and a space before it; names have what is left.
        figure = {"justify": "right", "no_wrap": True, "min_width": 1 + max(map(len, text.split("\n")))}
        table.add_column(text, **(figure if column else {"overflow": "fold"}))
    for number, (name, *cells) in enumerate(body):
        run, newline, version = name.partition("\n")
        run = run if run.startswith(" ") else _broken(run)
        table.add_row(
            f"{run}{newline}{version}", *cells, style="dim" if number % 2 else "", end_section=number % 2 == 1
        )
    return table


def _broken(name: str) -> str:
    r"""Break a long name into lines, where its parts end.

    Example:
        >>> _broken("000-agc.threshold=0.5,seed_everything=1")
        '000-\nagc.threshold=0.5,\nseed_everything=1'
    """
    lines = [""]
    for part in re.findall(r"[^/,\s-]*[/,\s-]?", name):
        if lines[-1] and len(lines[-1]) + len(part) > _WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _markdown(rows: Sequence[Row]) -> str:
    header, *body = _cells(rows)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    table = "\n".join("| " + " | ".join(" ".join(text.split()) for text in line) + " |" for line in lines)
    return f"{table}\n\n{_caption(rows)}\n"


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """A header, then two lines for each run: its measures, and under them those of its control."""
    column, _ = _measure(rows)
    shown = "copies" if column == "copied_fraction" else "memorized\nfraction"
    # Thresholds that tell something about the first run and its control.
    levels = telling_thresholds(_mq(rows[0]), _mq(rows[0], "_control"))[-2:]
    lines = [["run", "FID", shown, *(f"MQ\n< {level}" for level in levels), "skipped", "steps", "time"]]
    for row in rows:
        effort = [
            percent(row["skip_rate"] if row["threshold"] or row["skip_rate"] else None),
            f"{row['steps']:,}",
            str(timedelta(seconds=round(row["seconds"]))),
        ]
        version = Path(row["folder"]).name
        which = f"\n  {version}" if version.startswith("version_") and version not in row["run"] else ""
        for name, end, rest in ((f"{row['run']}{which}", "", effort), ("  control", "_control", ["", "", ""])):
            shares = [row[f"{measure}{end}"] for measure in (column, *(f"mq_{level}" for level in levels))]
            lines.append([name, three_digits(row[f"fid{end}"]), *map(percent, shares), *rest])
    return lines


def _caption(rows: Sequence[Row]) -> str:
    features = rows[0]["features"]
    fid = f"FID in {features} features; that of the training images themselves: {three_digits(rows[0]['fid_train'])}."
    caption = "Of copies and MQ, the control's figures are what images have that nobody can have memorised. "
    caption += fid if features else "FID was not measured."
    settings = {
        tuple(row[name] for name in ("num_samples", "sampler", "num_inference_steps", "use_ema")) for row in rows
    }
    if len(settings) > 1:
        caption += " Note: these runs sampled their images with different settings; see comparison.csv."
    return caption
