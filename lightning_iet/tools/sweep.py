"""Run a sweep in the file format of Weights & Biases on this machine, without an account."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from difflib import get_close_matches
from itertools import islice
from math import ceil, isnan, nan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_iet.evaluation.assessment import Scores, objective
from lightning_iet.evaluation.report import named_figures, read_metrics
from lightning_iet.evaluation.verdict import copies_exceed
from lightning_iet.functional.checks import check_at_least
from lightning_iet.search import Job, SweepFile, grid_points, open_study, read_sweep, run_jobs
from lightning_iet.search.jobs import PROGRAM, command_of, interrupted_by_sigterm
from lightning_iet.search.shared_study import SharedStudy
from lightning_iet.search.sweep_file import OBJECTIVE
from lightning_iet.tools.compare import compare
from lightning_iet.tools.configs import shipped_configuration
from lightning_iet.utilities.devices import environment_of_a_job
from lightning_iet.utilities.files import METRICS, check_writable, write_csv
from lightning_iet.utilities.progress import progress_bar
from lightning_iet.utilities.text import in_words, percent, say, three_digits

RESULTS = "sweep.csv"
_MANY = 4  # runs, fewer of which begin without an estimate, which takes some seconds


def sweep(
    files: Sequence[Path], *, jobs: int = 1, out: Path = Path("runs/sweeps"), trials: int | None = None, seed: int = 0
) -> None:
    """Run sweeps, such as configs/sweeps/agc_threshold.yaml, on this machine.

    Every point is a run of its own, in OUT/NAME/; what has finished is not run again, so the same command goes on with
    a sweep that was cut off, and tries again what failed. Values may be added to a grid or taken away; runs of another
    command are neither taken for its own nor overwritten. Ctrl-C and SIGTERM end its runs, too. Writes sweep.csv, one
    row for each run, and the table and the plot of `compare`, also of an interrupted sweep. Names the run of the least
    FID among those that copy no more than held-out images do, and the best by the file's metric (eval/objective, if it
    names none: FID, raised by copies). The same files work with `wandb sweep` and `wandb agent`.

    Args:
        files: Files of sweeps: method grid, random or bayes (these two choose points with Optuna).
        jobs: Runs at a time, each on its part of the cores.
        out: Folder for the runs.
        trials: Number of runs of random and bayes; by default the file's run_cap, after which a grid ends, too.
        seed: Seed of the choice.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is no sweep, its folder holds runs of another command, or all of its runs failed.
    """
    check_at_least(1, jobs=jobs)
    check_at_least(1, optional=True, trials=trials)
    paths = [Path(file) for file in files]  # or the names of sweeps that come with the package
    sweeps = [read_sweep(path if path.is_file() else shipped_configuration(path) or path) for path in paths]
    for plan in sweeps:
        if plan.method != "grid" and trials is None and plan.cap is None:
            raise ValueError(f"Argument `trials` expected a number of runs for '{plan.path}', but got none.")
    if trials is not None and all(plan.method == "grid" for plan in sweeps):
        raise ValueError(
            f"Argument `trials` expected a sweep of method random or bayes, but got {trials} for '{sweeps[0].path}', a "
            "grid. Leave it out; `run_cap` in the file ends a grid after so many points."
        )
    with interrupted_by_sigterm():
        for plan in sweeps:
            folder = Path(out) / plan.name
            check_writable(folder, argument="out", remedy="Give another folder with `--out`.")
            _run(plan, folder, jobs=jobs, trials=trials or plan.cap or 0, seed=seed)


def _run(plan: SweepFile, folder: Path, *, jobs: int, trials: int, seed: int) -> None:
    """Run what has not finished; an interrupted sweep still has its table."""
    errors: dict[Path, str] = {}
    with ExitStack() as stack:
        if plan.method == "grid":
            study, planned = None, _jobs_of_grid(plan, folder)
            total, finished = len(planned), len(_finished(planned))
            waiting = (job for job in planned if not job.is_finished)
        else:
            study = stack.enter_context(open_study(plan, folder, trials=trials, seed=seed))
            study.retry_failed()  # of earlier calls, as the points of a grid are
            total, finished = trials, sum(trial.has_figures for trial in study.trials())
            drawn = iter(lambda: study.next(trials), None)
            waiting = (_job(plan, folder, trial.number, trial.parameters) for trial in drawn)
            planned = _jobs_of_study(plan, folder, study)
        _announce(plan, _finished(planned), total=total, left=total - finished, jobs=jobs)
        bar = stack.enter_context(progress_bar(f"Runs of {plan.name}", total, completed=finished))

        def ended(job: Job, error: str | None) -> None:
            bar.advance()
            if error is not None:
                errors[job.folder] = error
            found = None if error is not None else _metric(plan, figures(job.folder))
            if study is not None and found is None:
                study.fail(job.number, str(error))
            elif study is not None and found is not None:
                study.tell(job.number, [found], None)

        try:
            run_jobs(_unfinished(waiting, ended), jobs, ended=ended)
        except ValueError:
            stack.close()
            if study is not None and not any(trial.has_figures for trial in study.trials()):
                study.discard()  # it would keep the metric that no run has; the same points are drawn again
            raise
        except KeyboardInterrupt:
            stack.close()
            runs = _finished(planned if study is None else _jobs_of_study(plan, folder, study))
            if runs:
                _publish(plan, folder, runs, errors)
            again = "The same command goes on, without the runs that have finished."
            say(f"Interrupted: {len(runs)} of {total} runs have finished. {again}")
            raise
    runs = _finished(planned if study is None else _jobs_of_study(plan, folder, study))
    _publish(plan, folder, runs, errors)


def _jobs_of_grid(plan: SweepFile, folder: Path) -> list[Job]:
    """Return the jobs of the points; one that a run has finished, under whatever number, has the folder of that run."""
    runs = sorted(file.parent for file in folder.glob(f"*/{METRICS}"))
    known = {tuple(command): run for run in runs if (command := command_of(run)) is not None}
    jobs = [_job(plan, folder, *point) for point in enumerate(islice(grid_points(plan.parameters), plan.cap))]
    return [replace(job, folder=known.get(tuple(job.command), job.folder)) for job in jobs]


def _jobs_of_study(plan: SweepFile, folder: Path, study: SharedStudy) -> list[Job]:
    """Return the jobs of all points that were drawn so far."""
    return [_job(plan, folder, trial.number, trial.parameters) for trial in study.trials()]


def _unfinished(jobs: Iterable[Job], ended: Callable[[Job, None], None]) -> Iterator[Job]:
    """Yield the jobs that are to be run; one that has finished, and that the study does not know of, is told to it."""
    for job in jobs:
        if job.is_finished:
            ended(job, None)
        else:
            yield job


def _announce(plan: SweepFile, runs: Sequence[Path], *, total: int, left: int, jobs: int) -> None:
    """Say how many runs there are, by what the best is chosen, and about how long they will take."""
    finished = total - left
    have = f", {finished} of which have finished" if finished else ""
    says = f"{plan.name}: {total} runs{have}, {min(jobs, max(left, 1))} at a time"
    seconds = _seconds_of_run(plan, runs, jobs=jobs) if left >= _MANY else None
    if seconds is not None:
        says += f"; about {in_words(seconds * ceil(left / jobs))} if each takes {in_words(seconds)}"
    aim = "FID, raised by copies" if plan.metric == OBJECTIVE else plan.metric
    goal = "highest" if plan.maximize else "lowest"
    chosen = f"lowest FID among the runs whose copies do not exceed those of held-out images; also the {goal} {aim}"
    say(f"{says}.\nThe best: {chosen}.")


def _seconds_of_run(plan: SweepFile, runs: Sequence[Path], *, jobs: int) -> float | None:
    """The mean time of finished runs; else what `plan` measures of the first point, without its evaluation."""
    reports = [read_metrics(run / METRICS, kind="evaluation")["run"] for run in runs]
    if reports:
        return sum(run["seconds"] + run.get("evaluation_seconds", 0.0) for run in reports) / len(reports)
    point = next(grid_points(plan.parameters)) if plan.method == "grid" else {}
    program, *words = plan.arguments(point)
    if program != PROGRAM or "fit" not in words:
        return None
    words[words.index("fit")] = "plan"
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / "plan.json"
        options = ["--trainer.logger=false", "--measure_steps=3", f"--out={file}"]
        subprocess.run(  # noqa: S603 (the command of the user's file)
            [sys.executable, "-m", "lightning_iet", *words, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment_of_a_job(jobs),
            check=False,
        )
        if not file.is_file():  # what is wrong with the command, its runs will say
            return None
        seconds = json.loads(file.read_text())["seconds"]
        return None if seconds is None else float(seconds)


def _finished(jobs: Iterable[Job]) -> list[Path]:
    """Return the folders of the jobs that have finished."""
    return [job.folder for job in jobs if job.is_finished]


def _metric(plan: SweepFile, found: Mapping[str, float]) -> float:
    """Return the figure that a sweep optimises.

    Raises:
        ValueError: If a run has no such figure, naming those that it has.
    """
    metric = plan.metric.removeprefix("eval/")
    if metric not in found:
        known = [f"eval/{name}" for name in found]
        close = get_close_matches(plan.metric, known, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"Sweep '{plan.path}' expected a metric among {', '.join(known)}, but got {plan.metric}.{meant} "
            "Finished runs stay: correct the file, and give the same command again."
        )
    return found[metric]


def _job(plan: SweepFile, folder: Path, number: int, point: Mapping[str, Any]) -> Job:
    """Return the job of a point.

    Raises:
        ValueError: If a run of another command has finished in its folder, which would be lost.
    """
    values = ",".join(f"{name.rpartition('.')[2]}={value}" for name, value in point.items())
    # A name for people; the number keeps apart what looks the same in it.
    name = f"{number:03d}-{re.sub(r'[^a-zA-Z0-9.,=_+-]+', '_', values)[:100]}"
    job = Job(number, dict(point), plan.arguments(point), folder / name, METRICS)
    before = command_of(job.folder) if job.is_finished else None
    if before is not None and before != job.command:
        raise ValueError(
            f"Sweep '{plan.path}' expected runs of its own command in '{folder}', but got '{name}', which is one of "
            f"`{shlex.join(before)}`. Give the file another `name`, or another folder with --out."
        )
    return job


def figures(folder: Path) -> dict[str, float]:
    """Return the measures of a finished run, by the names that loggers know them by, without ``eval/``.

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
    return found | named_figures(report["generated"], report["control"])


def _publish(plan: SweepFile, folder: Path, runs: Sequence[Path], errors: Mapping[Path, str]) -> None:
    """Write and print what the runs of a sweep have found."""
    for run, error in errors.items():
        say(f"Failed: {run.name}: {error}", style="red")
    if not runs:
        raise ValueError(f"Argument `files` expected a sweep whose runs work, but all of '{plan.path}' failed.")
    rows: list[dict[str, Any]] = [{"run": run.name, **figures(run)} for run in runs]
    values = {run.name: _metric(plan, row) for run, row in zip(runs, rows, strict=True)}
    write_csv(folder / RESULTS, rows)
    try:
        say(_best_without_copies(compare(runs, out=folder)))
    except ValueError as error:  # a sweep over options of the data or of FID: each run is still measured by its own
        say(f"No table, and no best FID among the runs that do not copy: {error}", style="yellow")
    known = {name: value for name, value in values.items() if not isnan(value)}
    if known:
        best = (max if plan.maximize else min)(known, key=lambda name: known[name])
        say(f"Best by {plan.metric}: {best} ({known[best]:.4g}).")
    say(f"All figures: {folder / RESULTS}")


def _best_without_copies(rows: Sequence[Mapping[str, Any]]) -> str:
    """Name the run of the best quality among those that copy no more than held-out images do.

    Args:
        rows: Of :func:`~lightning_iet.tools.compare.compare`.
    """
    copies = "copied_fraction" if all("copied_fraction" in row for row in rows) else "memorized_fraction"
    allowed = [row for row in rows if not copies_exceed(row[copies], row[f"{copies}_control"], row["num_samples"])]
    which = f"{len(allowed)} of {len(rows)} runs whose copies do not exceed those of held-out images"
    if not allowed:
        return f"No run keeps its copies down to those of held-out images ({len(rows)} runs)."
    if any(row["fid"] is None for row in allowed):
        return f"{which}: {', '.join(row['run'] for row in allowed)}. FID was not measured, so none is the best."
    best = min(allowed, key=lambda row: float(row["fid"]))
    return (
        f"Best FID among the {which}: {best['run']} (FID {three_digits(best['fid'])}, copies {percent(best[copies])})."
    )
