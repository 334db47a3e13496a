"""All runs of a preset, one after the other, searches first; what has finished is not run again."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.finetuning.rows import ROWS, SEARCH, Row
from benchmarks.finetuning.search import choose, groups_of, random_mask, search, trials_of
from benchmarks.finetuning.settings import Preset, Setting
from benchmarks.finetuning.training import Judge, Tuning, fine_tune, pretrain
from benchmarks.mitigation.features import load_features, prepare_features
from benchmarks.mitigation.runs import Results, Run
from lightning_iet.utilities.devices import peak_memory

SEARCHES, TRIALS = "searches.csv", "trials.csv"
SEARCH_SEED = 0  # whose images the search sees; the other seeds have other images of the same classes


def runs_of(preset: Preset, *, rows: set[str] | None = None) -> list[Run]:
    """All runs of a preset, the first seed first, and in it the search, whose mask serves for all seeds.

    Args:
        preset: setting, seeds and rows.
        rows: names of rows to keep; ``None`` = all.

    Raises:
        ValueError: for names that no row has.
    """
    unknown = (rows or set()) - {row.name for row in ROWS}
    if unknown:
        known = ", ".join(row.name for row in ROWS)
        raise ValueError(f"Argument `rows` expected names of {known}, but got {', '.join(sorted(unknown))}.")
    setting = preset.setting
    wanted = [
        row
        for row in ROWS
        if (row.name in preset.rows if preset.rows is not None else not row.only)
        and (rows is None or row.name in rows)
        and (row.mask != "random" or row.number <= setting.num_random)
        and (row.mask != "other" or setting.transfer_from)
    ]
    runs = [Run(setting, row, seed) for seed in preset.seeds for row in wanted]
    if any(row.needs_search for row in wanted):
        runs.insert(1 if wanted[0].name == "full" else 0, Run(setting, SEARCH, SEARCH_SEED))
    return runs


def carry_out(runs: list[Run], results: Results, other: str) -> Iterator[Run]:
    """Do what is left, and yield each run as it finishes.

    Args:
        runs: in their order; those that have a result are passed over.
        results: where results go.
        other: the mask of another data set, for rows that ask for it.
    """
    for run in runs:
        if results.find(run) is None:
            results.keep(run, carry_out_one(run, results, other))
            yield run


def carry_out_one(run: Run, results: Results, other: str) -> dict[str, Any]:
    """Train and judge one run, or search."""
    setting, row = run.setting, run.row
    assert isinstance(setting, Setting)
    assert isinstance(row, Row)
    work = results.unfinished
    prepare_features(setting, work)
    pretrained = pretrain(setting, work)
    judge = Judge(setting, row, run.seed, load_features(setting, work))
    folder = work / run.folder
    if row == SEARCH:
        found = search(setting, pretrained, judge, folder)
        seconds = sum({p.candidate.name: p.seconds for p in found.all_points}.values())
        return {"points": [], "trials": trials_of(found, setting), "seconds": seconds, "peak_memory": peak_memory()}
    shutil.rmtree(folder, ignore_errors=True)
    tuning = _tuning(run, results, other)
    points = fine_tune(
        setting, row, tuning, pretrained, judge,
        marks=setting.marks(dense=row.name == "full"), seed=run.seed, folder=folder,
    )  # fmt: skip
    return {
        "points": points,
        "control": judge.control(),
        "tuning": {"family": tuning.family, "mask": tuning.mask, "rate": tuning.rate},
        "parameters": groups_of(setting).total,
        "peak_memory": peak_memory(),
    }


def _tuning(run: Run, results: Results, other: str) -> Tuning:
    """What a row trains, how fast."""
    setting, row = run.setting, run.row
    if not row.needs_search:
        return Tuning(row.family, None, row.rate * setting.learning_rate)
    found = found_in(replace(run, row=SEARCH, seed=SEARCH_SEED), results)
    if found is None:
        raise ValueError(
            f"The row {row.name} needs the search, which has no result yet: run the preset without --rows."
        )
    mask, rate = found["mask"], found["rate"]
    masks = {"": None, "found": mask, "other": other}
    if row.mask == "random":
        return Tuning(setting.family, random_mask(setting, mask, seed=run.seed, number=row.number), rate)
    return Tuning(setting.family, masks[row.mask], rate)


def found_in(run: Run, results: Results) -> dict[str, Any] | None:
    """What a search chose, if it has finished."""
    result = results.find(run)
    if result is None:
        return None
    setting, row = run.setting, run.row
    assert isinstance(setting, Setting)
    assert isinstance(row, Row)
    judge = Judge(setting, row, run.seed, load_features(setting, results.unfinished))
    return choose(result["trials"], control=judge.control()[setting.copies], setting=setting)


def search_lines(runs: list[Run], results: Results) -> list[dict[str, Any]]:
    """What the searches found, a line for each."""
    return [
        {"setting": run.setting.name, "seed": run.seed, **found}
        for run in runs
        if run.row == SEARCH and (found := found_in(run, results)) is not None
    ]


def trial_lines(runs: list[Run], results: Results) -> list[dict[str, Any]]:
    """Every checkpoint of the searches' trials."""
    found = [results.find(run) for run in runs if run.row == SEARCH]
    return [trial for result in found if result is not None for trial in result["trials"]]
