"""The search, on trainings whose outcome is known beforehand."""

import csv
import json
import os
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_iet.callbacks.parameter_selection import read_mask
from lightning_iet.functional.parameter_groups import find_groups
from lightning_iet.functional.pareto import hypervolume
from lightning_iet.search import Candidate, jobs, search_selection, shared_study
from tests.helpers.distributed import forking
from tests.helpers.landscapes import CONTROL, GROUPS, every_mask, figures

QUIET = {"objectives": ["fid", "memorized"], "progress": False}
FIXED = {"learning_rates": (1e-4, 1e-4)}


def search(folder, function=figures, groups=GROUPS, **options):
    """A search whose trials are kept in a journal, which is faster than a database; ``storage=None`` is the default."""
    journal = Path(folder) / "search.journal"
    return search_selection(function, groups, out=folder, **{**QUIET, "storage": journal, **options})


def points_of(result):
    """What a trial was given and what it came to, of all trials."""
    return [(p.candidate, p.step, p.values, p.copied_from) for p in (*result.points, *result.references)]


def rows_of(folder):
    with (Path(folder) / "points.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def dominates(u, v):
    return all(a <= b for a, b in zip(u, v, strict=True)) and any(a < b for a, b in zip(u, v, strict=True))


def test_trying_every_mask_finds_the_front_of_all(tmp_path):
    names = GROUPS[:4]
    function = partial(figures, groups=names, checkpoints=2)
    result = search(tmp_path, function, names, enqueue=every_mask(names), trials=2 ** len(names), **FIXED)
    expected = {}
    for mask in every_mask(names):
        kind = "mask" if "1" in mask else "pretrained"
        for found in function(Candidate("", kind, mask, 1e-4)):
            expected[mask, found["step"]] = (found["fid"], max(0.0, found["memorized"] - CONTROL))
    front = {at for at, v in expected.items() if not any(dominates(other, v) for other in expected.values())}
    found = {(p.candidate.mask, p.step): p.values for p in result.points}
    assert found.keys() == expected.keys()
    for at, values in expected.items():
        assert found[at] == pytest.approx(values)
    assert {(p.candidate.mask, p.step) for p in result.front} == front
    within = {at: v for at, v in expected.items() if at[0].count("1") and v[1] <= 0.01}
    chosen, choice = result.choice
    assert (chosen.candidate.mask, chosen.step) == min(within, key=lambda at: within[at])
    assert choice.rule == "control"


def test_tpe_comes_near_the_whole_front_in_fifty_trials(tmp_path):
    result = search(tmp_path, trials=50, seed=1)
    corner = (10.0, 1.0)
    best = [
        [figures(Candidate("", "mask", mask, 1e-4))[0][name] for name in ("fid", "memorized")] for mask in every_mask()
    ]
    best = [(fid, max(0.0, copies - CONTROL)) for fid, copies in best]

    reached = hypervolume(result.costs(result.points), corner)
    assert reached >= 0.9 * hypervolume(torch.tensor(best, dtype=torch.float64), corner)


def test_what_is_tried_first(tmp_path):
    result = search(tmp_path, trials=8, enqueue=["101010"])
    assert [(p.candidate.kind, p.candidate.learning_rate) for p in result.references] == [
        ("plain", pytest.approx(1e-4)), ("plain", 1e-5), ("plain", 1e-3), ("pretrained", 0.0),
    ]  # fmt: skip
    first = [(p.candidate.mask, p.candidate.learning_rate) for p in result.points][:6]
    assert first == [
        ("111111", pytest.approx(1e-4)), ("101010", pytest.approx(1e-4)), ("111111", 1e-5), ("111111", 1e-3),
        ("000001", pytest.approx(1e-4)), ("000000", 0.0),
    ]  # fmt: skip
    zeros = result.points[5]
    assert (zeros.candidate.kind, zeros.copied_from) == ("pretrained", "pretrained-3")
    assert zeros.values == result.references[3].values == (10.0, 0.0)


def test_few_trials_try_the_masks_of_the_user(tmp_path):
    masks = ["101010", "010101"]
    result = search(tmp_path / "enough", trials=3, enqueue=masks)
    assert [point.candidate.mask for point in result.points] == ["111111", *masks]
    with pytest.raises(ValueError, match="`trials` expected at least 3, for all ones and the masks of `enqueue`"):
        search(tmp_path / "few", trials=2, enqueue=masks)


def test_a_seed_draws_the_same_trials(tmp_path):
    results = [search(tmp_path / name, trials=14, seed=seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))]
    assert points_of(results[0]) == points_of(results[1]) != points_of(results[2])


def test_a_search_goes_on_with_more_trials(tmp_path):
    calls = []

    def counted(candidate):
        calls.append(candidate.name)
        return figures(candidate)

    whole = search(tmp_path / "whole", trials=15, sampler="random")
    search(tmp_path / "parts", counted, trials=9, sampler="random")
    parts = search(tmp_path / "parts", counted, trials=15, sampler="random")
    assert points_of(parts) == points_of(whole)
    assert len(calls) == len(set(calls))
    before = list(calls)
    search(tmp_path / "parts", counted, trials=15, sampler="random")
    assert calls == before


def test_first_masks_that_fail_count_once_however_often_the_search_is_called(tmp_path):
    def failing(candidate):
        if candidate.kind == "plain" or candidate.mask == "111111":
            raise RuntimeError("out of memory")
        return figures(candidate)

    options = {"sampler": "random", **FIXED}
    whole = search(tmp_path / "whole", failing, trials=6, **options)
    for trials in (3, 6, 6):
        parts = search(tmp_path / "parts", failing, trials=trials, **options)
    assert [point.candidate.mask for point in parts.points] == [point.candidate.mask for point in whole.points]
    assert sorted(parts.failures.values()) == sorted(whole.failures.values())


@dataclass
class Killed:
    """Kills the program in its ``at``-th training, once; writes down what it began."""

    folder: Path
    at: int

    def __call__(self, candidate):
        journal = self.folder / "calls"
        with journal.open("a") as file:
            file.write(f"{candidate.name}\n")
        if len(journal.read_text().splitlines()) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return figures(candidate, checkpoints=2)


def _run_until_killed(folder, at, storage):
    shared_study.UNCLAIMED = 0.1  # in this process; the test's own has it so, too
    search(folder, Killed(folder, at), trials=14, seed=2, storage=storage)


def test_a_killed_search_comes_to_the_same_points(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_study, "UNCLAIMED", 0.1)
    whole = search(tmp_path / "whole", partial(figures, checkpoints=2), trials=14, seed=2)
    folder = tmp_path / "killed"
    folder.mkdir()
    storage = folder / "trials.journal"  # databases are those of the tests of studies
    for at in (2, 11):  # among the references, and among masks
        process = forking().Process(target=_run_until_killed, args=(folder, at, storage))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    result = search(folder, Killed(folder, 0), trials=14, seed=2, storage=storage)
    assert points_of(result) == points_of(whole)
    begun = (folder / "calls").read_text().splitlines()
    assert len(begun) == len(set(begun)) + 2  # the two that were cut off, again
    ours, theirs = ([{**row, "seconds": ""} for row in rows_of(place)] for place in (folder, tmp_path / "whole"))
    assert ours == theirs
    assert (folder / "report.html").is_file()


def _share(folder, storage):
    search(folder, trials=16, storage=storage, seed=os.getpid())


def test_two_programs_on_one_storage(tmp_path):
    storage = tmp_path / "shared.journal"
    processes = [forking().Process(target=_share, args=(tmp_path / str(number), storage)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    result = search(tmp_path / "all", trials=16, storage=storage)
    names = [point.candidate.name for point in result.all_points]
    assert len(names) == len(set(names))
    assert 16 <= len(result.points) <= 17
    assert len(result.references) == 4
    assert not result.failures
    assert result.running == 0


def test_two_jobs_are_two_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_CONTEXT", forking())  # of a warm process, for the sake of time
    function = partial(figures, checkpoints=2)
    result = search(tmp_path / "two", function, trials=12, jobs=2)
    assert len({point.candidate.name for point in result.points}) == 12
    assert not result.failures
    for point in result.all_points:
        kind = point.candidate
        found = next(f for f in function(kind) if f["step"] == point.step)
        assert point.values == (found["fid"], max(0.0, found["memorized"] - CONTROL))


@dataclass
class Failing:
    """Fails for some masks, or says what is no number."""

    bad: str
    how: str

    def __call__(self, candidate):
        found = figures(candidate)
        if candidate.mask == self.bad:
            if self.how == "raises":
                raise RuntimeError("out of memory\nin many words")
            found[0]["memorized"] = {"nan": float("nan"), "none": None}[self.how]
        return found


@pytest.mark.parametrize(
    ("how", "reason"),
    [("raises", "RuntimeError: out of memory"), ("nan", "memorized is nan"), ("none", "memorized is nan")],
)
def test_a_failed_trial_is_no_point_and_does_not_end_the_search(tmp_path, how, reason):
    result = search(tmp_path, Failing("111111", how), trials=9, **FIXED)
    assert set(result.failures.values()) == {reason}
    assert all(point.candidate.mask != "111111" for point in result.points)
    failed = [row for row in rows_of(tmp_path) if row["state"] == "failed"]
    assert [row["note"] for row in failed] == list(result.failures.values())
    assert len({point.candidate.name for point in result.points}) + len(result.failures) == 9


def test_masks_that_all_fail_end_the_search_though_references_work(tmp_path):
    def broken(candidate):
        if candidate.kind == "mask" and "1" in candidate.mask:
            raise KeyError("unet.conv_in.bias")
        return figures(candidate)

    with pytest.raises(ValueError, match=r"the first 6 masks failed, the last one with: KeyError: 'unet\.conv_in"):
        search(tmp_path, broken, trials=20)


def test_that_the_pretrained_network_can_be_measured_says_nothing_of_masks(tmp_path):
    def broken(candidate):
        if candidate.kind == "mask":
            raise KeyError("unet.conv_in.bias")
        return figures(candidate)

    enqueued = {"enqueue": ["0" * len(GROUPS)], "references": False}
    with pytest.raises(ValueError, match=r"the first (3|6 masks) failed, the last one with: KeyError"):
        search(tmp_path, broken, trials=20, **enqueued)


def test_trainings_that_all_fail_end_the_search(tmp_path):
    calls = []

    def broken(candidate):
        calls.append(candidate)
        raise FileNotFoundError("no such data")

    with pytest.raises(ValueError, match="the first 3 failed, the last one with: FileNotFoundError: no such data"):
        search(tmp_path, broken, trials=9)
    assert len(calls) == 3


def test_a_search_whose_trials_all_run_elsewhere_says_so(tmp_path, monkeypatch):
    def interrupted(candidate):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, interrupted, trials=1, references=False)
    monkeypatch.setattr(shared_study, "_is_alive", lambda claim: True)
    with pytest.raises(ValueError, match=r"1 trial still runs elsewhere, .* when it has ended") as error:
        search(tmp_path, trials=1, references=False)
    assert "\n" not in str(error.value)


def test_an_objective_that_is_not_measured_ends_the_search_at_once(tmp_path):
    calls = []

    def counted(candidate):
        calls.append(candidate)
        return figures(candidate)

    with pytest.raises(ValueError, match=r"`mifid` is not among distance, .*memorized") as error:
        search(tmp_path, counted, objectives=["mifid", "memorized"], trials=9)
    assert "\n" not in str(error.value)
    assert len(calls) == 1
    search(tmp_path, objectives=["fid", "memorized"], trials=6)  # as the message says
    with pytest.raises(ValueError, match=r"expected objectives.fid minimize"):  # figures are kept
        search(tmp_path, objectives=["distance", "memorized"], trials=6)


def test_distances_are_maximised(tmp_path):
    ours = search(tmp_path / "max", objectives=["fid", "max:distance"], minus_control=False, trials=30, seed=3)
    for point in ours.all_points:
        (measured,) = figures(point.candidate)
        assert point.values == (measured["fid"], measured["distance"])
    for point in ours.front:  # no point has a better FID and a larger distance
        assert not any(dominates((p.values[0], -p.values[1]), (point.values[0], -point.values[1])) for p in ours.points)
    assert ours.controls == (1.0, pytest.approx(1 - CONTROL))
    assert ours.limits == (pytest.approx(-(1 - CONTROL)),)
    chosen = ours.choice[0]
    assert chosen.values[1] >= 1 - CONTROL
    beyond = search(tmp_path / "beyond", objectives=["fid", "max:distance"], trials=6, seed=3)
    for point in beyond.points:
        assert point.values[1] == pytest.approx(max(0.0, point.figures["memorized"] - CONTROL))


def test_a_mask_that_repeats_is_not_trained_again(tmp_path):
    names = GROUPS[:2]
    calls = []

    def counted(candidate):
        calls.append((candidate.kind, candidate.mask))
        return figures(candidate, groups=names)

    result = search(tmp_path / "once", counted, names, trials=20, sampler="random", **FIXED)
    assert len(calls) == len(set(calls)) == 2 + 3  # plain, pretrained; and three masks: all zeros is the pretrained one
    assert len(result.points) == 20
    originals = {point.candidate.name: point for point in result.all_points}
    for point in result.points:
        if point.copied_from:
            original = originals[point.copied_from]
            assert not original.copied_from
            assert (point.values, point.step) == (original.values, original.step)
            assert point.candidate.mask == original.candidate.mask or original.candidate.kind == "pretrained"
    assert len(result.front) == len({point.candidate.mask for point in result.front})

    calls.clear()
    search(tmp_path / "again", counted, names, trials=20, sampler="random", repeat_duplicates=True, **FIXED)
    assert len(calls) == 20 + 2


def test_learning_rates_within_a_twentieth_are_one(tmp_path):
    narrow = search(tmp_path / "narrow", trials=12, sampler="random", learning_rates=(1e-4, 1.04e-4))
    seen = {}
    for point in narrow.points:
        if point.candidate.kind == "mask":
            assert bool(point.copied_from) == (point.candidate.mask in seen)
            seen.setdefault(point.candidate.mask, point)
    wide = search(tmp_path / "wide", trials=3, sampler="random", learning_rates=(1e-4, 1.2e-4))
    assert not any(point.copied_from for point in wide.points)


def test_files_of_masks_belong_to_the_network(tmp_path):
    network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "out": nn.Linear(2, 1)})
    groups = find_groups(network, "bias")
    names = ("blocks.0", "blocks.1", "rest")
    result = search(tmp_path, partial(figures, groups=names), groups, trials=12, settings={"family": "bias"})
    assert result.groups == names
    assert result.sizes == (2, 2, 1)
    files = sorted((tmp_path / "masks").glob("*.json"))
    trained = [point for point in result.front if point.candidate.kind == "mask"]
    assert len(files) == len(trained) > 0
    for file, point in zip(files, trained, strict=True):
        mask = read_mask(file)
        mask.check(groups)
        assert mask.selection.mask + str(int(mask.selection.rest)) == point.candidate.mask
        assert mask.source["trial"] == point.candidate.name
        assert tuple(mask.source["objectives"].values()) == point.values
        assert point.trained == groups.count(point.candidate.mask)
        assert point.share == pytest.approx(groups.share(point.candidate.mask))
    chosen = read_mask(tmp_path / "chosen.json")
    assert chosen.source["trial"] == result.choice[0].candidate.name
    assert chosen.source["rule"] == result.choice[1].rule
    assert chosen.source["settings"]["family"] == "bias"


def test_a_rest_that_always_trains_has_no_bit(tmp_path):
    network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "out": nn.Linear(2, 1)})
    groups = replace(find_groups(network, "bias"), granularity="published")
    result = search(tmp_path, partial(figures, groups=("blocks.0", "blocks.1")), groups, trials=8, **FIXED)
    assert result.groups == ("blocks.0", "blocks.1")
    trained = {point.candidate.mask: (point.candidate.kind, point.trained) for point in result.points}
    assert trained["00"] == ("mask", 1)
    assert trained["11"] == ("mask", 5)


def test_masks_of_unnamed_networks_are_plain_json(tmp_path):
    result = search(tmp_path, trials=10)
    content = json.loads((tmp_path / "chosen.json").read_text())
    assert "".join(map(str, content["mask"].values())) == result.choice[0].candidate.mask
    assert tuple(content["mask"]) == GROUPS


def test_points_are_in_the_table(tmp_path):
    result = search(tmp_path, partial(figures, checkpoints=3), trials=10)
    rows = rows_of(tmp_path)
    assert [row["trial"] for row in rows] == [point.candidate.name for point in result.all_points]
    for row, point in zip(rows, result.all_points, strict=True):
        assert float(row["fid"]) == point.values[0]
        assert float(row["memorized beyond control"]) == point.values[1]
        assert float(row["memorized"]) == point.figures["memorized"]
        assert (row["front"] == "1") == (point in result.front)
    assert [row["trial"] for row in rows if row["chosen"] == "1"] == [result.choice[0].candidate.name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "`trials` expected an integer ≥ 1, but got 0"),
        ({"jobs": 0}, "`jobs` expected an integer ≥ 1"),
        ({"seed": -1}, "`seed` expected an integer ≥ 0"),
        ({"learning_rates": (1e-3, 1e-5)}, "0 < lowest ≤ highest, but got 0.001 and 1e-05. Turn them around?"),
        ({"learning_rates": (0, 1e-5)}, "0 < lowest"),
        ({"groups": []}, "names of groups, at least one"),
        ({"groups": ["a", "a"]}, "every name once"),
        ({"groups": ["learning rate"]}, "none called 'learning rate'"),
        ({"enqueue": ["101"]}, "masks of 6 characters 0 and 1, for down.0, .*, but got '101' of 3"),
        ({"enqueue": ["10101x"]}, "masks of 6 characters"),
        ({"objectives": ["fid"]}, "at least two figures"),
        ({"sampler": "anneal"}, "one of tpe, nsga2, random"),
    ],
)
def test_bad_input(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        search(tmp_path, **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_another_search_in_the_folder_is_refused(tmp_path):
    search(tmp_path, trials=3, settings={"steps": 100})
    for options, message in (
        ({"settings": {"steps": 200}}, "expected steps 100, with which it was begun, but got 200"),
        ({"settings": {"steps": 100}, "groups": (*GROUPS[:5], "other")}, "expected groups.rest 6, .* but got nothing"),
        ({"settings": {"steps": 100}, "learning_rates": (1e-6, 1e-3)}, "learning rates 1e-05 to 0.001"),
        ({"settings": {"steps": 100}, "objectives": ["fid", "distance"]}, "expected objectives.memorized beyond"),
    ):
        with pytest.raises(ValueError, match=message):
            search(tmp_path, trials=4, **options)


def test_lines_for_each_trial_and_the_table(tmp_path, capsys):
    search(tmp_path, Failing("111111", "raises"), trials=8, progress=True, **FIXED)
    said = capsys.readouterr().out
    assert said.count("trial-") >= 8
    assert "trial-000: failed: RuntimeError: out of memory" in said
    assert "plain-0: all parameters at learning rate 0.0001: fid" in said
    assert "same mask and learning rate as pretrained-1" in said
    assert "Chosen: " in said
