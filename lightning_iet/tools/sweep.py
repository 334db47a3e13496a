"""Run a sweep in the file format of Weights & Biases on this machine, without an account."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import nan
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_iet.evaluation.assessment import Scores, objective
from lightning_iet.evaluation.report import read_metrics
from lightning_iet.search import Job, SweepFile, grid_points, open_study, read_sweep, run_jobs
from lightning_iet.tools.compare import compare
from lightning_iet.utilities.configurations import shipped_configuration
from lightning_iet.utilities.files import METRICS, check_writable, write_csv
from lightning_iet.utilities.progress import progress_bar

RESULTS = "sweep.csv"


def sweep(
    files: Sequence[Path], *, jobs: int = 1, out: Path = Path("runs/sweeps"), count: int | None = None, seed: int = 0
) -> None:
    """Run sweeps, such as configs/sweeps/agc_threshold.yaml, on this machine.

    Every point is a run of its own, in OUT/NAME/; what has finished is not run again, so the same command goes on with
    a sweep that was cut off. Writes sweep.csv, one row for each run, and the table and the plot of `compare`. The
    same files work with `wandb sweep` and `wandb agent`.

    Args:
        files: Files of sweeps: method grid, random or bayes (these two choose points with Optuna).
        jobs: Runs at a time, each on its part of the cores.
        out: Folder for the runs.
        count: Number of runs of random and bayes; by default the file's run_cap.
        seed: Seed of the choice.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is no sweep, or all of its runs failed.
    """
    if jobs < 1:
        raise ValueError(f"Argument `jobs` expected an integer ≥ 1, but got {jobs}.")
    sweeps = [read_sweep(_file(Path(file))) for file in files]
    for plan in sweeps:
        if plan.method != "grid" and count is None and plan.cap is None:
            raise ValueError(f"Argument `count` expected a number of runs for '{plan.path}', but got none.")
    for plan in sweeps:
        folder = Path(out) / plan.name
        check_writable(folder, argument="out", remedy="Give another folder with `--out`.")
        _run(plan, folder, jobs=jobs, count=count or plan.cap or 0, seed=seed)


def _file(path: Path) -> Path:
    """A file of that path, or the sweep of that name that comes with the package."""
    return path if path.is_file() else shipped_configuration(path) or path


def _run(plan: SweepFile, folder: Path, *, jobs: int, count: int, seed: int) -> None:
    errors: dict[Path, str] = {}
    if plan.method == "grid":
        planned = [_job(plan, folder, *point) for point in enumerate(grid_points(plan.parameters))]
        with progress_bar(f"Runs of {plan.name}", len(planned)) as bar:
            bar.advance(sum(job.is_finished for job in planned))

            def ended(job: Job, error: str | None) -> None:
                bar.advance()
                if error is not None:
                    errors[job.folder] = error

            run_jobs((job for job in planned if not job.is_finished), jobs, ended=ended)
    else:
        study = open_study(plan, folder, trials=count, seed=seed)
        with study, progress_bar(f"Runs of {plan.name}", count) as bar:
            bar.advance(sum(trial.state in ("complete", "failed") for trial in study.trials()))

            def told(job: Job, error: str | None) -> None:
                bar.advance()
                if error is None:
                    study.tell(job.number, [figures(job.folder)[plan.metric.removeprefix("eval/")]], None)
                else:
                    study.fail(job.number, error)
                    errors[job.folder] = error

            drawn = iter(lambda: study.next(count), None)
            run_jobs((_job(plan, folder, trial.number, trial.parameters) for trial in drawn), jobs, ended=told)
    _publish(plan, folder, errors)


def _job(plan: SweepFile, folder: Path, number: int, point: Mapping[str, Any]) -> Job:
    values = ",".join(f"{name.rpartition('.')[2]}={value}" for name, value in point.items())
    # A name for people; the number keeps apart what looks the same in it.
    name = f"{number:03d}-{re.sub(r'[^a-zA-Z0-9.,=_+-]+', '_', values)[:100]}"
    return Job(number, dict(point), plan.arguments(point), folder / name, METRICS)


def figures(folder: Path) -> dict[str, float]:
    """Return the measures of a finished run, by the names that loggers know them by, without ``eval/``.

    Args:
        folder: the run's folder.

    Returns:
        ``fid``, ``memorized_fraction``, ``mq_0.15`` …, ``skip_rate``, further measures, and of most the control's.
    """
    report = read_metrics(folder / METRICS, kind="evaluation")
    names = {field.name for field in fields(Scores)}
    parts: list[dict[str, Any]] = [
        {name: nan if value is None else value for name, value in report[part].items()}  # FID, without features
        for part in ("generated", "control")
    ]
    score = objective(*(Scores(**{name: value for name, value in part.items() if name in names}) for part in parts))
    found = {"objective": score, "fid_train": report["train"]["fid"], "skip_rate": report["run"]["skip_rate"]}
    for suffix, part in (("", report["generated"]), ("_control", report["control"])):
        found |= {
            f"{name}{suffix}": part[name] for name in ("fid", "memorized_fraction", "copied_fraction") if name in part
        }
        found |= {f"mq_{threshold}{suffix}": share for threshold, share in part["mq"].items()}
        found |= {f"{name}{suffix}": value for name, value in part["further"].items()}
    return found


def _publish(plan: SweepFile, folder: Path, errors: Mapping[Path, str]) -> None:
    console = Console()
    for run, error in errors.items():
        console.print(f"Failed: {run.name}: {error}", style="red", highlight=False, markup=False)
    runs = sorted(file.parent for file in folder.glob(f"*/{METRICS}"))
    if not runs:
        raise ValueError(f"Argument `files` expected a sweep whose runs work, but all of '{plan.path}' failed.")
    rows: list[dict[str, Any]] = [{"run": run.name, **figures(run)} for run in runs]
    metric = plan.metric.removeprefix("eval/")
    if metric not in rows[0]:
        known = ", ".join(f"eval/{name}" for name in rows[0] if name != "run")
        raise ValueError(f"Sweep '{plan.path}' expected a metric among {known}, but got {plan.metric}.")
    write_csv(folder / RESULTS, rows)
    compare(runs, out=folder)
    best = sorted(rows, key=lambda row: float(row[metric]), reverse=plan.maximize)[0]
    best_by = f"Best by {plan.metric}: {best['run']} ({best[metric]:.4g})."
    console.print(f"{best_by} All figures: {folder / RESULTS}", soft_wrap=True)
