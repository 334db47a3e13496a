"""What fine-tuning a part of a network buys: every way of it on few images, over several seeds.

    python -m benchmarks.finetuning --preset digits     a network of eight digits, fine-tuned on 20 images of two others
    python -m benchmarks.finetuning --preset uneven     the same where three of 36 images occur eight times each
    python -m benchmarks.finetuning --preset fashion    one of nine kinds of clothes, on 50 images of the tenth
    python -m benchmarks.finetuning --preset fashion_200   the same on 200 images
    python -m benchmarks.finetuning --preset smoke      the first in miniature, to see that it works
    python -m benchmarks.finetuning --preset digits --report   tables again, from results/finetuning_digits/points.csv

Runs follow one another in one process; give it one core (OMP_NUM_THREADS=1). Cut off at whatever moment, the same
command goes on: what has finished is not run again, and a search goes on at its next trial. `fashion` tries the masks
of `digits`, which must have been found before. In results/finetuning_PRESET there are then points.csv (every run at
every length), searches.csv (what the search chose), trials.csv (all that it tried), summary.csv (means over seeds) and
environment.json.
"""

import argparse
import csv
import json
import os
import platform
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks.finetuning.rows import SEARCH
from benchmarks.finetuning.runs import SEARCHES, TRIALS, carry_out, runs_of, search_lines, trial_lines
from benchmarks.finetuning.settings import PRESETS, Preset
from benchmarks.finetuning.summary import summarize
from benchmarks.finetuning.tables import PAGE, tables_of
from benchmarks.mitigation.__main__ import COLUMNS, alone, commit, names
from benchmarks.mitigation.points import FILE, collect, read_points, write_table
from benchmarks.mitigation.runs import Results, Run
from benchmarks.mitigation.tables import fill_pages
from benchmarks.mitigation.training import silence
from lightning_iet.utilities.files import check_writable, write_atomically

ROOT = Path(__file__).parents[2]
PUBLISHED = ("digits", "uneven", "fashion", "fashion_200")  # presets whose tables docs show


def main(arguments: list[str] | None = None) -> int:
    """Run what is left of a preset, and report; 0 if all that was asked for is there."""
    options = parse(arguments)
    folder = options.out or folder_of(options.preset)
    preset = PRESETS[options.preset]
    try:
        check_writable(folder, argument="out", remedy="Give another folder with --out.")
        runs = runs_of(preset, rows=names(options.rows))
        if not options.report:
            run_all(runs, preset, folder, options.preset)
        missing = [run for run in runs if Results(folder).find(run) is None] if not options.report else []
        lines = summarize(read_points(folder))
        write_table(lines, folder / "summary.csv")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.", file=sys.stderr)
        return 130
    if options.out is None and options.preset in PUBLISHED:
        fill_pages(ROOT, published_tables(), [PAGE])
    for name, table in tables_of(lines).items():
        print(f"\n{name}\n\n{table}")
    return 1 if missing else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.finetuning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(PRESETS), required=True)
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/finetuning_PRESET)")
    parser.add_argument("--rows", help="only these rows, such as full,found (default: all of the preset)")
    parser.add_argument("--report", action="store_true", help="run nothing; tables of what is there")
    return parser.parse_args(arguments)


def folder_of(preset: str) -> Path:
    """Where the results of a preset belong."""
    return ROOT / "results" / f"finetuning_{preset}"


def run_all(runs: list[Run], preset: Preset, folder: Path, name: str) -> None:
    """Carry out what is left, under a progress bar, and write the points after every run."""
    silence()
    results, began = Results(folder, commit=commit()), time.time()
    other = mask_of(preset.setting.transfer_from) if any(run.row.name == "other" for run in runs) else ""
    everything = runs_of(preset)
    with alone(results.unfinished), Progress(*COLUMNS, console=Console(stderr=True)) as progress:
        done = sum(results.find(run) is not None for run in runs)
        task = progress.add_task(name, total=len(runs), completed=done)
        for run in carry_out(runs, results, other):
            write_table(collect([run for run in everything if run.row != SEARCH], results), folder / FILE)
            if run.row == SEARCH:
                write_search(everything, results)
            progress.update(task, advance=1, description=run.name)
            note_environment(folder, everything, results, preset, name, seconds=time.time() - began)
            began = time.time()
    write_search(everything, results)  # also where the program was cut off between a search and its tables


def write_search(runs: list[Run], results: Results) -> None:
    """Write what the searches chose and all that they tried; a choice measures its control, which takes a moment."""
    write_table(search_lines(runs, results), results.folder / SEARCHES)
    write_table(trial_lines(runs, results), results.folder / TRIALS)


def mask_of(preset: str) -> str:
    """The mask that the search of another preset has found.

    Raises:
        FileNotFoundError: if it has not been run.
    """
    file = folder_of(preset) / SEARCHES
    if not file.exists():
        raise FileNotFoundError(f"The mask of another data set is that of the preset {preset}: run it first.")
    with file.open(newline="") as stream:
        return next(csv.DictReader(stream))["mask"]


def note_environment(
    folder: Path, runs: list[Run], results: Results, preset: Preset, name: str, *, seconds: float
) -> None:
    """Add to what is known of how the results came about; the time is that of all calls together."""
    file = folder / "environment.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    found = [result for run in runs if (result := results.find(run)) is not None]
    packages = ("lightning-iet", "torch", "lightning", "diffusers", "optuna")
    known = {
        "command": f"python -m benchmarks.finetuning --preset {name}",
        "date": date.today().isoformat(),
        "commits": sorted({result["commit"] for result in found}),
        "seeds": list(preset.seeds),
        "versions": {package: version(package) for package in packages},
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "minutes": round(before.get("minutes", 0) + seconds / 60, 2),
        "peak_memory_gib": round(max(result["peak_memory"] for result in found) / 2**30, 2),
    }
    with write_atomically(file) as path:
        path.write_text(json.dumps(known, indent=1) + "\n")


def published_tables() -> dict[str, str]:
    """The tables of all published presets that have results."""
    tables: dict[str, str] = {}
    for preset in PUBLISHED:
        if (folder_of(preset) / FILE).exists():
            tables |= tables_of(summarize(read_points(folder_of(preset))))
    return tables


if __name__ == "__main__":
    sys.exit(main())
