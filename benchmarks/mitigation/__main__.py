"""What each method buys, and what it costs: trains and audits every method on small data sets, over several seeds.

    python -m benchmarks.mitigation --preset laptop          digits and Fashion-MNIST, about an hour on 2 cores
    python -m benchmarks.mitigation --preset smoke           the same in miniature, to see that it works
    python -m benchmarks.mitigation --preset gpu --minutes 9 larger models and more images, in slices of 9 minutes
    python -m benchmarks.mitigation --preset laptop --report tables and pictures again, from results/laptop/points.csv

Cut off at whatever moment, the same command goes on: what has finished is not run again. In results/PRESET it leaves
points.csv (every run at every length), summary.csv (means over seeds with 95 % intervals), equal_quality.csv (every
method against plain training stopped at the same FID), environment.json, and a picture for each data set; of the laptop
preset the tables in README and docs are renewed as well.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import cuda

from benchmarks.mitigation.pictures import draw_pictures
from benchmarks.mitigation.points import FILE, collect, read_points, write_table
from benchmarks.mitigation.runs import Results, Run, carry_out, runs_of
from benchmarks.mitigation.settings import PRESETS
from benchmarks.mitigation.summary import equal_quality, summarize
from benchmarks.mitigation.tables import fill_pages, tables_of
from lightning_iet.tools.run_folder import check_writable, write_atomically

ROOT = Path(__file__).parents[2]
PUBLISHED = "laptop"  # the preset whose tables and pictures README and docs show
PICTURES = ROOT / "docs" / "images"


def main(arguments: list[str] | None = None) -> int:
    """Run what is left of a preset, and report; 0 if all of it is there."""
    options = parse(arguments)
    folder = options.out or ROOT / "results" / options.preset
    try:
        check_writable(folder, argument="out", remedy="Give another folder with --out.")
        if options.report:
            report(folder, is_published=options.preset == PUBLISHED and options.out is None)
            return 0
        runs = runs_of(PRESETS[options.preset], rows=set(options.rows.split(",")) if options.rows else None)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    results = Results(folder)
    try:
        run_all(runs, results, options)
    except (RuntimeError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    missing = [run for run in runs if results.find(run) is None]
    if missing:
        print(f"{len(missing)} of {len(runs)} runs are left; the same command goes on with them.")
        return 1
    write_table(collect(runs, results), folder / FILE)
    report(folder, is_published=options.preset == PUBLISHED and not options.out and not options.rows)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.mitigation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(PRESETS), required=True)
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/PRESET)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one for each core; on a GPU, one)")
    parser.add_argument("--rows", help="only these rows, such as plain,iet_agc_4 (default: all of the preset)")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes, and go on with the next call")
    parser.add_argument("--report", action="store_true", help="run nothing; tables and pictures of what is there")
    options = parser.parse_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"Argument `jobs` expected an integer ≥ 1, but got {options.jobs}.")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"Argument `minutes` expected a number > 0, but got {options.minutes}.")
    return options


def run_all(runs: list[Run], results: Results, options: argparse.Namespace) -> None:
    """Carry out what is left, under a progress bar, and keep the clock and the memory."""
    wants_gpu = PRESETS[options.preset].device == "gpu"
    device = "gpu" if wants_gpu and cuda.is_available() else "cpu"
    jobs = options.jobs or (1 if device == "gpu" else os.cpu_count() or 1)
    left = [run for run in runs if results.find(run) is None]
    began = time.time()
    deadline = began + 60 * options.minutes if options.minutes else None
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(
            f"{options.preset}, {jobs} at a time", total=len(runs), completed=len(runs) - len(left)
        )
        most = 0
        for run in carry_out(left, results, jobs=jobs, deadline=deadline, device=device):
            progress.update(task, advance=1, description=run.name)
            most = max(most, _memory())
            note_environment(results.folder, runs, jobs=jobs, seconds=time.time() - began, memory=most)
            began = time.time()


def note_environment(folder: Path, runs: list[Run], *, jobs: int, seconds: float, memory: int) -> None:
    """Add to what is known of how the results came about; the time is that of all slices together."""
    file = folder / "environment.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    known = {
        "command": f"python -m benchmarks.mitigation --preset {folder.name}",
        "date": date.today().isoformat(),
        "commit": _commit(),
        "seeds": sorted({run.seed for run in runs}),
        "versions": {
            name: version(name) for name in ("lightning-iet", "torch", "lightning", "diffusers", "torchmetrics")
        },
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}
        | ({"gpu": cuda.get_device_name()} if cuda.is_available() else {}),
        "jobs": jobs,
        "minutes": round(before.get("minutes", 0) + seconds / 60, 3),
        "peak_memory_gib": round(max(before.get("peak_memory_gib", 0), memory / 2**30), 2),
    }
    with write_atomically(file) as path:
        path.write_text(json.dumps(known, indent=1) + "\n")


def report(folder: Path, *, is_published: bool) -> None:
    """Print the table of each setting; write summaries and pictures, and renew the tables in README and docs."""
    points = read_points(folder)
    write_table(summarize(points), folder / "summary.csv")
    write_table(equal_quality(points), folder / "equal_quality.csv")
    console = Console()
    for setting in dict.fromkeys(point["setting"] for point in points):
        console.print(_terminal_table([line for line in summarize(points) if line["setting"] == setting], setting))
    pictures = draw_pictures(points, folder)
    changed = [*fill_pages(ROOT, tables_of(points)), *draw_pictures(points, PICTURES)] if is_published else []
    for file in (*(folder / name for name in ("summary.csv", "equal_quality.csv")), *pictures, *changed):
        console.print(f"Written: {os.path.relpath(file)}", style="dim", soft_wrap=True)


def _terminal_table(lines: list[dict], setting: str) -> Table:
    table = Table(title=f"{setting}: means over seeds; × = length in units of the best stopping point")
    for name in ("method", "×", "FID", "memorized", "MQ < 0.15", "AUC", "time"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for line in lines:
        shares = [f"{100 * line[name]:.1f} %" for name in ("memorized_fraction", "mq_0.15")]
        length = "" if line["length"] is None else f"{line['length']:g}"
        spent = "" if line["time"] is None else f"{line['time']:.2f}"
        table.add_row(line["label"], length, f"{line['fid']:.2f}", *shares, f"{line['membership_auc']:.2f}", spent)
    return table


def _memory() -> int:
    """Bytes of this process and its workers."""
    me = psutil.Process()
    return sum(process.memory_info().rss for process in (me, *me.children(recursive=True)))


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    sys.exit(main())
