"""What each method buys, and what it costs: trains and audits every method on small data sets, over several seeds.

    python -m benchmarks.mitigation --preset laptop          digits and Fashion-MNIST, 75 minutes on 2 cores
    python -m benchmarks.mitigation --preset uneven          images that occur many times among others
    python -m benchmarks.mitigation --preset smoke           the same in miniature, to see that it works
    python -m benchmarks.mitigation --preset gpu --minutes 9 larger models and more images, in slices of 9 minutes
    python -m benchmarks.mitigation --preset laptop --report tables and pictures again, from results/laptop/points.csv

Cut off at whatever moment, the same command goes on: what has finished is not run again, and at most two minutes of the
rest. Fashion-MNIST is read from ./data or from where Debian's package dataset-fashion-mnist puts it. In results/PRESET
there are then points.csv (every run at every length), summary.csv (means over seeds with 95 % intervals),
equal_quality.csv (every method against plain training stopped at the same FID), environment.json, and a picture for
each data set; of the laptop preset the tables in README and docs are renewed as well.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import cuda

from benchmarks.mitigation.pictures import draw_pictures
from benchmarks.mitigation.points import FILE, collect, read_points, write_table
from benchmarks.mitigation.runs import Results, Run, carry_out, runs_of
from benchmarks.mitigation.settings import PRESETS
from benchmarks.mitigation.summary import equal_quality, stopped_in_time, summarize
from benchmarks.mitigation.tables import PAGES, fill_pages, tables_of
from lightning_iet.data import FashionMNISTDataModule
from lightning_iet.search.jobs import interrupted_by_sigterm
from lightning_iet.utilities.devices import peak_memory
from lightning_iet.utilities.files import check_writable, write_atomically

ROOT = Path(__file__).parents[2]
PUBLISHED = ("laptop", "uneven")  # presets whose tables and pictures README and docs show
PICTURES = ROOT / "docs" / "images"
COLUMNS = (
    TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run what is left of a preset, and report; 0 if all that was asked for is there."""
    options = parse(arguments)
    folder = options.out or ROOT / "results" / options.preset
    is_published = options.preset in PUBLISHED and options.out is None
    try:
        check_writable(folder, argument="out", remedy="Give another folder with --out.")
        if options.report:
            report(folder, is_published=is_published)
            return 0
        preset = PRESETS[options.preset]
        runs = runs_of(
            preset, rows=names(options.rows), without=names(options.without), settings=names(options.settings)
        )
        if options.download:
            FashionMNISTDataModule(download=True).prepare_data()
        results, problem = Results(folder, commit=commit()), ""
        with alone(results.unfinished):
            try:
                run_all(runs, results, options)
            except RuntimeError as error:
                problem = str(error)
            write_table(collect(runs_of(preset), results), folder / FILE)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.", file=sys.stderr)
        return 130
    missing = [run for run in runs if results.find(run) is None]
    if read_points(folder):
        report(folder, is_published=is_published and not missing)
    if missing:
        print(f"{len(missing)} of {len(runs)} runs are left; the same command goes on with them.")
    if problem:
        print(problem, file=sys.stderr)
    return 1 if missing else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.mitigation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(PRESETS), required=True)
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/PRESET)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one for each core; on a GPU, one)")
    parser.add_argument("--rows", help="only these rows, such as plain,iet_agc_4 (default: all of the preset)")
    parser.add_argument("--settings", help="only these settings, such as uneven_digits (default: all of the preset)")
    parser.add_argument("--without", help="all rows but these")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes, and go on with the next call")
    parser.add_argument("--download", action="store_true", help="fetch Fashion-MNIST into ./data, if it is not there")
    parser.add_argument("--report", action="store_true", help="run nothing; tables and pictures of what is there")
    options = parser.parse_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"Argument `jobs` expected an integer ≥ 1, but got {options.jobs}.")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"Argument `minutes` expected a number > 0, but got {options.minutes}.")
    return options


def names(text: str | None) -> set[str] | None:
    """The names in a comma-separated list."""
    return {name.strip() for name in text.split(",")} if text else None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; end the workers with this one, whoever ends it."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OSError(
            f"Argument `out` expected a folder where nobody is at work, but got '{folder.parent}'. Wait for that."
        ) from error
    with lock, interrupted_by_sigterm():
        try:
            yield
        except KeyboardInterrupt:
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            raise


def run_all(runs: list[Run], results: Results, options: argparse.Namespace) -> None:
    """Carry out what is left, under a progress bar, and keep the clock."""
    wants_gpu = PRESETS[options.preset].device == "gpu"
    device = "gpu" if wants_gpu and cuda.is_available() else "cpu"
    jobs = options.jobs or (1 if device == "gpu" else os.cpu_count() or 1)
    left = [run for run in runs if results.find(run) is None]
    began = time.time()
    deadline = began + 60 * options.minutes if options.minutes else None
    try:
        with Progress(*COLUMNS, console=Console(stderr=True)) as progress:
            done = len(runs) - len(left)
            task = progress.add_task(f"{options.preset}, {jobs} at a time", total=len(runs), completed=done)
            for run in carry_out(left, results, jobs=jobs, deadline=deadline, device=device):
                progress.update(task, advance=1, description=run.name)
    finally:
        note_environment(results, options, jobs=jobs, seconds=time.time() - began)


def note_environment(results: Results, options: argparse.Namespace, *, jobs: int, seconds: float) -> None:
    """Add to what is known of how the results came about; the time is that of all slices together."""
    file = results.folder / "environment.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    found = [result for run in runs_of(PRESETS[options.preset]) if (result := results.find(run)) is not None]
    if not found:
        return  # cut off before the first run ended: what is known of published results stays
    memory = jobs * max((result["peak_memory"] for result in found), default=0) + peak_memory()
    packages = ("lightning-iet", "torch", "lightning", "diffusers", "torchmetrics")
    known = {
        "command": f"python -m benchmarks.mitigation --preset {options.preset}",
        "date": date.today().isoformat(),
        "commits": sorted({result["commit"] for result in found}),
        "seeds": list(PRESETS[options.preset].seeds),
        "versions": {name: version(name) for name in packages},
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}
        | ({"gpu": cuda.get_device_name()} if cuda.is_available() else {}),
        "jobs": jobs,
        "minutes": round(before.get("minutes", 0) + seconds / 60, 2),
        "core_minutes": round(sum(result["points"][-1]["seconds"] for result in found) / 60, 2),
        "peak_memory_gib": round(memory / 2**30, 2),
    }
    with write_atomically(file) as path:
        path.write_text(json.dumps(known, indent=1) + "\n")


def commit() -> str:
    """What the code is; "dirty" where it has been changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def report(folder: Path, *, is_published: bool) -> None:
    """Print the table of each setting; write summaries and pictures, and renew the tables in README and docs."""
    points = read_points(folder)
    lines, equals, in_time = summarize(points), equal_quality(points), stopped_in_time(points)
    write_table(lines, folder / "summary.csv")
    write_table(equals, folder / "equal_quality.csv")
    console = Console()
    for setting in dict.fromkeys(line["setting"] for line in lines):
        console.print(_terminal_table([line for line in lines if line["setting"] == setting], setting))
    written = [folder / "summary.csv", folder / "equal_quality.csv", *draw_pictures(lines, folder)]
    if in_time:
        write_table(in_time, folder / "stopped_in_time.csv")
        written.append(folder / "stopped_in_time.csv")
    if is_published:
        shown = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
        pictures = [file for file in written if file.suffix == ".png" and file.name in shown]
        copies = [Path(shutil.copy(picture, PICTURES)) for picture in pictures]
        written += [*fill_pages(ROOT, published_tables()), *copies]
    for file in written:
        console.print(f"Written: {os.path.relpath(file)}", style="dim", soft_wrap=True)


def published_tables() -> dict[str, str]:
    """Every table that README and docs may show: those of all published presets."""
    tables: dict[str, str] = {}
    for preset in PUBLISHED:
        points = read_points(ROOT / "results" / preset)
        tables |= tables_of(summarize(points), equal_quality(points), stopped_in_time(points))
    return tables


def _terminal_table(lines: list[dict], setting: str) -> Table:
    if "copies_repeated" in lines[0]:
        return _uneven_table(lines, setting)
    table = Table(title=f"{setting}: means over seeds; × = length in units of that of least held-out loss")
    for name in ("method", "×", "FID", "memorized", "MQ < 0.15", "AUC", "time"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for line in lines:
        shares = [f"{100 * line[name]:.1f} %" for name in ("memorized_fraction", "mq_0.15")]
        length = "" if line["length"] is None else f"{line['length']:g}"
        spent = "" if line["time"] is None else f"{line['time']:.2f}"
        table.add_row(line["label"], length, f"{line['fid']:.2f}", *shares, f"{line['membership_auc']:.2f}", spent)
    return table


def _uneven_table(lines: list[dict], setting: str) -> Table:
    table = Table(title=f"{setting}: means over seeds; copies by the ratio to the next image that shows something else")
    for name in ("method", "×", "FID", "copies of repeated", "(< 1/2)", "of others", "nearest", "skipped", "time"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for line in lines:
        names = ("copies_repeated", "copies_repeated_half", "copies_once", "nearest_repeated", "skip_rate")
        length = "" if line["length"] is None else f"{line['length']:g}"
        spent = "" if line["time"] is None else f"{line['time']:.2f}"
        table.add_row(
            line["label"], length, f"{line['fid']:.2f}", *(f"{100 * line[name]:.1f} %" for name in names), spent
        )
    return table


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
