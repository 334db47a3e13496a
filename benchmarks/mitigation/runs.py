"""All runs of a preset: which are left to do, each in a process of its own for every core, and what they found."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.mitigation.dp_sgd import check_opacus, train_privately
from benchmarks.mitigation.features import load_features, prepare_features
from benchmarks.mitigation.rows import ROWS, Row
from benchmarks.mitigation.scoring import Judge
from benchmarks.mitigation.settings import Preset, Setting
from benchmarks.mitigation.training import OutOfTime, make_module, silence, train
from lightning_iet.utilities.devices import peak_memory
from lightning_iet.utilities.files import write_atomically


@dataclass(frozen=True)
class Run:
    """One training with its judgements.

    Attributes:
        setting: the data set and all that goes with it.
        row: the method.
        seed: of everything.
    """

    setting: Setting
    row: Row
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.setting.name}/{self.row.name}-{self.seed}"

    @property
    def folder(self) -> str:
        """Of what is not finished: other settings do not go on with it."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{digest[:8]}"

    @property
    def identity(self) -> dict[str, Any]:
        """What its figures depend on; labels do not count, nor options at their defaults: a new one voids nothing."""
        facts = {"setting": _changed(self.setting), "row": _changed(self.row), "seed": self.seed}
        for name in ("label", "only"):
            facts["row"].pop(name, None)
        return json.loads(json.dumps(facts))


def _changed(options: Row | Setting) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults."""
    return {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if getattr(options, field.name) != field.default
    }


def runs_of(
    preset: Preset,
    *,
    rows: set[str] | None = None,
    without: set[str] | None = None,
    settings: set[str] | None = None,
) -> list[Run]:
    """All runs of a preset, the first seed first, so that a look at half of them shows every row.

    Args:
        preset: settings, seeds and rows.
        rows: names of rows to keep; ``None`` = all.
        without: names of rows to leave out.
        settings: names of settings to keep; ``None`` = all.

    Raises:
        ValueError: for names that no row, or no setting of the preset, has.
    """
    strange = (settings or set()) - {setting.name for setting in preset.settings}
    if strange:
        known = ", ".join(setting.name for setting in preset.settings)
        raise ValueError(f"Argument `settings` expected names of {known}, but got {', '.join(sorted(strange))}.")
    without = without or set()
    unknown = ((rows or set()) | without) - {row.name for row in ROWS}
    if unknown:
        known = ", ".join(row.name for row in ROWS)
        raise ValueError(f"Argument `rows` expected names of {known}, but got {', '.join(sorted(unknown))}.")
    found = []
    for seed in preset.seeds:
        for setting in preset.settings:
            if settings is not None and setting.name not in settings:
                continue
            wanted = preset.rows.get(setting.name)
            for row in ROWS:
                suits = row.name in wanted if wanted else not row.only or setting.source in row.only
                if suits and row.name not in without and (rows is None or row.name in rows):
                    found.append(Run(setting, row, seed))
    return found


class Results:
    """A folder of results: a JSON file for each finished run.

    Args:
        folder: where ``runs`` lie; made if need be. What is not finished lies in ``unfinished``.
        commit: what the code is, for the record.
    """

    def __init__(self, folder: Path, *, commit: str = "unknown") -> None:
        self.folder = folder
        self.commit = commit
        self.unfinished = folder / "unfinished"
        self.unfinished.mkdir(parents=True, exist_ok=True)

    def file(self, run: Run) -> Path:
        """Where a run's result belongs."""
        return self.folder / "runs" / f"{run.name}.json"

    def find(self, run: Run) -> dict[str, Any] | None:
        """A run's result, if it has been run with the same settings."""
        file = self.file(run)
        if not file.exists():
            return None
        result = json.loads(file.read_text())
        return result if result["identity"] == run.identity else None

    def keep(self, run: Run, result: dict[str, Any]) -> None:
        """Write a result with the commit that it is of, and clear what it was made of away."""
        file = self.file(run)
        file.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(file) as path:
            path.write_text(json.dumps({"identity": run.identity, "commit": self.commit, **result}, indent=1) + "\n")
        shutil.rmtree(self.unfinished / run.folder, ignore_errors=True)


def carry_out(runs: list[Run], results: Results, *, jobs: int, deadline: float | None, device: str) -> Iterator[Run]:
    """Do what is left, ``jobs`` at a time, and yield each run as it finishes.

    Args:
        runs: what to do; nothing that has a result already.
        results: where results go.
        jobs: processes.
        deadline: by ``time.time()``: no later run begins, and those at work save their state; ``None`` = none.
        device: accelerator of Lightning's Trainer.

    Raises:
        RuntimeError: at the end, naming the runs that failed; the others have finished.
        FileNotFoundError: if the images are not there.
        ModuleNotFoundError: before the first run, if one of them needs what is not installed.
    """
    if any(run.row.epsilon for run in runs):
        check_opacus()
    for setting in {run.setting.name: run.setting for run in runs}.values():
        prepare_features(setting, results.unfinished)
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_begin, initargs=(threads,)) as pool:
        left, at_work, failures = iter(runs), dict[Future, Run](), list[str]()
        while True:
            while len(at_work) < jobs and (deadline is None or time.time() < deadline):
                run = next(left, None)
                if run is None:
                    break
                at_work[pool.submit(_carry_out_one, run, results.unfinished, deadline, device)] = run
            if not at_work:
                break
            done, _ = wait(at_work, return_when=FIRST_COMPLETED)
            for future in done:
                run = at_work.pop(future)
                error = future.exception()
                if error is None:
                    results.keep(run, future.result())
                    yield run
                elif not isinstance(error, OutOfTime):
                    failures.append(f"{run.name}: {type(error).__name__}: {error}")
    if failures:
        raise RuntimeError("These runs failed:\n" + "\n".join(failures))


def _begin(threads: int) -> None:
    silence()
    torch.set_num_threads(threads)


def _carry_out_one(run: Run, work: Path, deadline: float | None, device: str) -> dict[str, Any]:
    folder = work / run.folder
    if run.row.epsilon:
        cost = train_privately(run.setting, run.row, run.seed, folder)
    else:
        cost = train(run.setting, run.row, run.seed, folder, deadline=deadline, device=device)
    module = make_module(run.setting, run.row, seed=run.seed)
    features = load_features(run.setting, work)
    judge = Judge(run.setting, run.row, run.seed, features, device="cpu" if device == "cpu" else "cuda")
    points = []
    for mark in sorted(cost):
        file = folder / f"{mark:05d}.json"
        if not file.exists():
            if deadline is not None and time.time() > deadline:
                raise OutOfTime
            with write_atomically(file) as path:
                path.write_text(json.dumps(judge.score(module, folder / f"{mark:05d}.ckpt")))
        points.append({"mark": mark, **cost[mark], **json.loads(file.read_text())})
    return {
        "points": points,
        "control": judge.control(),
        "parameters": sum(p.numel() for p in module.unet.parameters()),
        "peak_memory": peak_memory(),
    }
