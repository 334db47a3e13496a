"""The benchmark of fine-tuning, in miniature: it runs, it resumes, and its tables say what its points say."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.finetuning.__main__ import PUBLISHED, folder_of, main, mask_of, published_tables
from benchmarks.finetuning.data import Sets, pretraining_images
from benchmarks.finetuning.rows import ROWS, SEARCH, row_named
from benchmarks.finetuning.runs import carry_out_one, runs_of
from benchmarks.finetuning.search import choose, groups_of, random_mask
from benchmarks.finetuning.settings import DIGITS, DIGITS_UNEVEN, FASHION, PRESETS, Preset
from benchmarks.finetuning.summary import FIGURES, TOLERANCE, stopped, stopping_rules, summarize
from benchmarks.finetuning.tables import PAGE, tables_of
from benchmarks.mitigation.points import FILE, read_points
from benchmarks.mitigation.runs import Results, Run
from benchmarks.mitigation.summary import UNEVEN
from benchmarks.mitigation.tables import fill
from lightning_iet.data import DrawnByWeight
from tests.helpers.state import undisturbed

ROOT = Path(__file__).parents[2]
SMOKE = replace(  # half as long, and half as many masks
    PRESETS["smoke"], setting=replace(PRESETS["smoke"].setting, stop=4, lengths=(1,), num_trials=2, checkpoints=1)
)


@pytest.fixture(scope="module", autouse=True)
def _short():
    """Shorter runs; and losses of a checkpoint, which no test reads, take longer than its trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "smoke", SMOKE)
        patch.setattr("benchmarks.mitigation.scoring.TIMESTEPS", 2)
        yield


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke preset, as a user runs it."""
    folder = tmp_path_factory.mktemp("finetuning")
    with undisturbed():  # a benchmark silences the loggers of its process
        assert main(["--preset", "smoke", "--out", str(folder)]) == 0
    return folder


def lines(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_row_is_in_the_points_and_the_search_in_a_table_of_its_own(smoke):
    points = lines(smoke / "points.csv")
    assert {point["row"] for point in points} == set(SMOKE.rows)
    assert all(point["mq_0.15_control"] and point["copies_half"] for point in points)
    (found,) = lines(smoke / "searches.csv")
    assert len(found["mask"]) == len(groups_of(SMOKE.setting).bits)
    tried = {trial["trial"] for trial in lines(smoke / "trials.csv") if trial["kind"] == "mask"}
    # A sampler may propose the same point twice: it is not trained again, and counts once.
    assert int(found["trials"]) == len(tried)
    assert 2 <= len(tried) <= SMOKE.setting.num_trials
    share = {point["row"]: float(point["share"]) for point in points}
    assert share["full"] == 1
    assert share["svdiff"] < 0.05
    assert share["found"] == share["found_iet_agc"] == pytest.approx(float(found["share"]))
    noted = json.loads((smoke / "environment.json").read_text())
    assert noted["command"] == "python -m benchmarks.finetuning --preset smoke"


def test_an_uneven_set_is_searched_and_judged_by_what_images_show(tmp_path, monkeypatch):
    rows = ("record_draws", "found")
    setting = replace(SMOKE.setting, name="smoke_uneven", num_repeated=2, repeats=4, plain_lengths=(1,))
    monkeypatch.setitem(PRESETS, "smoke", Preset(setting, (0,), rows))
    with undisturbed():
        assert main(["--preset", "smoke", "--out", str(tmp_path)]) == 0
    points = lines(tmp_path / "points.csv")
    assert {point["row"] for point in points} == set(rows)
    assert not any(name.startswith("mq") for name in points[0])  # takes an image that occurs often for many
    for point in points:
        halves = float(point["copies_repeated_half"]) + float(point["copies_once_half"])
        assert float(point["copies_half"]) == pytest.approx(halves, abs=1e-5)
    (found,) = lines(tmp_path / "searches.csv")
    assert {"copies_half", "copies_repeated", "copies_once"} < set(found)
    end = next(line for line in lines(tmp_path / "summary.csv") if (line["row"], line["at"]) == ("found", "end"))
    assert float(end["share"]) == pytest.approx(float(found["share"]))


def test_the_same_command_again_runs_nothing(smoke):
    before = {file: file.stat().st_mtime_ns for file in (smoke / "runs").rglob("*.json")}
    points = (smoke / FILE).read_bytes()
    assert main(["--preset", "smoke", "--out", str(smoke)]) == 0
    assert main(["--preset", "smoke", "--out", str(smoke), "--report"]) == 0
    assert {file: file.stat().st_mtime_ns for file in (smoke / "runs").rglob("*.json")} == before
    assert (smoke / FILE).read_bytes() == points
    assert not list((smoke / "unfinished").rglob("*.ckpt"))


def test_unknown_rows_are_refused_in_one_line(tmp_path, capsys):
    assert main(["--preset", "smoke", "--out", str(tmp_path), "--rows", "ful"]) == 2
    error = capsys.readouterr().err
    assert "Argument `rows` expected names of full" in error
    assert error.count("\n") == 1


def test_a_row_that_needs_the_search_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.finetuning.runs.pretrain", lambda *_: tmp_path)
    with pytest.raises(ValueError, match="The row whole needs the search, which has no result yet"):
        carry_out_one(Run(SMOKE.setting, row_named("whole"), 0), Results(tmp_path), "")


def test_the_mask_of_another_data_set_must_be_there():
    with pytest.raises(FileNotFoundError, match="that of the preset smoke: run it first"):
        mask_of("smoke")


def test_the_search_comes_before_what_needs_it_and_once():
    runs = runs_of(PRESETS["digits"])
    names = [run.row.name for run in runs]
    assert names[:2] == ["full", "search"]
    assert names.count("search") == 1
    assert "other" not in names  # no other data set to take it from
    assert sum(name.startswith("random") for name in names) == 3 * DIGITS.num_random
    assert [run.row.name for run in runs_of(PRESETS["digits"], rows={"full", "bias"})] == ["full", "bias"] * 3
    assert "other" in {run.row.name for run in runs_of(PRESETS["fashion"])}


def test_rows_for_uneven_sets_are_in_the_preset_that_names_them_alone():
    uneven = {row.name for row in ROWS if row.only}
    assert uneven == {"deduplicated", "record_draws", "found_record_draws"}
    for preset in ("digits", "fashion", "fashion_200", "smoke"):
        assert not uneven & {run.row.name for run in runs_of(PRESETS[preset])}
    assert {run.row.name for run in runs_of(PRESETS["uneven"])} == {*PRESETS["uneven"].rows, "search"}


def test_sets_hold_the_new_classes_alone_and_are_disjoint():
    first, second = (Sets(DIGITS, row_named("full"), seed=seed) for seed in (0, 1))
    names = ("train_set", "unseen", "control_set", "selection_set", "reference_set")
    images = [{image.numpy().tobytes() for image in getattr(first, name).images} for name in names]
    assert len(set().union(*images)) == sum(map(len, images)) == 354  # all 8s and 9s
    assert set(first.train_set.targets.tolist()) == {8, 9}
    assert not torch.equal(first.train_set.images, second.train_set.images)
    before = {image.numpy().tobytes() for image in pretraining_images(DIGITS)}
    assert not before & set().union(*images)


def test_an_uneven_set_repeats_some_images_and_a_row_may_leave_the_repetitions_out():
    sets = Sets(DIGITS_UNEVEN, row_named("full"), seed=0)
    assert len(sets.train_set) == len(sets.every_image) == 33 + 3 * 8
    assert sets.source.bincount().tolist() == [8] * 3 + [1] * 33
    shown = sets.train_set.images[:36]
    assert all((sets.train_set.images - shown[sets.source]).flatten(1).abs().mean(1) < 0.1)
    assert len(sets.train_set.images.flatten(1).unique(dim=0)) == 57  # occurrences differ a little
    held_out = [sets.unseen, sets.control_set, sets.selection_set, sets.reference_set]
    everything = {
        image.numpy().tobytes() for images in (shown, *(part.images for part in held_out)) for image in images
    }
    assert len(everything) == 354  # all 8s and 9s, each in one set only
    without = Sets(DIGITS_UNEVEN, row_named("deduplicated"), seed=0)
    assert torch.equal(without.train_set.images, shown)
    assert torch.equal(without.every_image.images, sets.every_image.images)
    drawn = Sets(DIGITS_UNEVEN, row_named("record_draws"), seed=0).train_dataloader().dataset
    assert isinstance(drawn, DrawnByWeight)
    assert len(drawn) == 57


@pytest.mark.parametrize("family", ["all", "svdiff"])
def test_random_masks_are_as_large_as_the_found_one_and_another(family):
    setting = replace(DIGITS, family=family)
    groups = groups_of(setting)
    found = "0110110011011"
    drawn = [random_mask(setting, found, seed=0, number=number) for number in (1, 2, 3)]
    assert len({*drawn, found}) == 4
    for mask in drawn:
        assert groups.count(mask) == pytest.approx(groups.count(found), rel=0.1)
    assert drawn[0] == random_mask(setting, found, seed=0, number=1)
    assert drawn[0] != random_mask(setting, found, seed=1, number=1)
    smallest = "".join("01"[bit == "rest"] for bit in groups.bits)
    assert random_mask(setting, smallest, seed=0, number=1) != smallest  # the nearest in size, if none is as large


def test_masks_fit_the_network_of_the_other_data_set():
    assert groups_of(DIGITS).bits == groups_of(FASHION).bits


def point(row, seed, length, fid, copies, *, auc=0.5, selection=None):
    return {
        "setting": "digits", "row": row, "seed": seed, "length": length, "mark": int(100 * length),
        "steps": int(100 * length), "seconds": 10.0 * length, "share": 0.5, "skip_rate": 0.0, "fid_train": 3.0,
        "fid_selection": fid if selection is None else selection,
        **dict.fromkeys(FIGURES, copies), "fid": fid, "membership_auc": auc,
        **{f"{name}_control": 0.02 for name in FIGURES if name != "membership_auc"},
    }  # fmt: skip


COURSE = [
    point("full", 0, 0.5, 20.0, 0.0),
    point("full", 0, 1, 10.0, 0.02 + TOLERANCE),
    point("full", 0, 2, 5.0, 0.6, auc=1.0),
]


def named(found, row, at):
    return next(line for line in found if (line["row"], line["at"]) == (row, at))


def test_a_run_is_stopped_at_its_best_mark_that_does_not_copy():
    assert stopping_rules(COURSE[0]) == {"stopped": "mq_0.15"}
    assert stopped(COURSE, "mq_0.15") is COURSE[1]
    assert stopped(COURSE[2:], "mq_0.15") is COURSE[2]  # none is allowed: the first
    found = summarize(COURSE)
    assert named(found, "full", "end")["fid"] == 5.0
    assert named(found, "full", "stopped")["fid"] == 10.0
    assert named(found, "full", "stopped")["never"] == 0
    assert named(summarize(COURSE[2:]), "full", "stopped")["never"] == 1


def test_a_row_stands_beside_full_fine_tuning_of_its_quality():
    found = summarize([*COURSE, point("found", 0, 2, 7.5, 0.1, auc=0.9)])
    line = named(found, "found", "equal")
    half = (0.02 + TOLERANCE + 0.6) / 2  # half way between two marks
    assert (line["mq_0.15"], line["mq_0.15_full"]) == (0.1, pytest.approx(half))
    assert line["mq_0.15_difference"] == pytest.approx(0.1 - half)
    assert line["membership_auc_full"] == pytest.approx(0.75)
    for fid, which in ((4.0, "better"), (30.0, "worse")):
        line = named(summarize([*COURSE, point("found", 0, 2, fid, 0.1)]), "found", "equal")
        assert line[which] == 1
        assert "mq_0.15_full" not in line


def test_random_masks_are_one_row_over_all_of_their_runs():
    found = summarize([*COURSE, point("random_1", 0, 2, 6.0, 0.0), point("random_2", 0, 2, 8.0, 0.2)])
    line = named(found, "random", "end")
    assert (line["label"], line["runs"], line["seeds"], line["fid"]) == ("random masks of the same size", 2, 1, 7.0)


def test_tables_show_the_rows_and_the_control():
    tables = tables_of(summarize([*COURSE, point("found", 0, 2, 7.5, 0.1), point("bias", 0, 2, 30.0, 0.0)]))
    end = tables["finetuning digits"].splitlines()
    shares = "60.0 % (60.0–60.0) | 60.0 % | 60.0 % | 60.0 %"
    assert end[2] == f"| full fine-tuning | 50 % | 5.0 (5.0–5.0) | {shares} | 1.00 (1.00–1.00) | 20 |"
    assert end[-1] == "| *held-out images* |  | *0.0* | *2.0 %* | *2.0 %* | *2.0 %* | *2.0 %* | *0.5: chance* |  |"
    assert "| 1.00 × |" in tables["finetuning digits stopped"].splitlines()[2]
    bias, found = tables["finetuning digits equal quality"].splitlines()[2:]
    assert bias == "| biases |  | full fine-tuning: better from the start in 1 of 1 runs |  |"
    assert found.startswith("| the found mask | 7.5 | 10.0 / 31.2 %; -21.2 (-21.2 to -21.2) |")


def uneven_point(row, length, fid, repeated, *, half):
    even = point(row, 0, length, fid, repeated)
    kept = {name: value for name, value in even.items() if name.removesuffix("_control") not in FIGURES}
    shares = dict.fromkeys(UNEVEN, 0.0) | {"copies_repeated": repeated, "copies_repeated_half": half}
    control = {f"{name}_control": 0.01 for name in ("fid", "copies_half", "memorized_fraction", *UNEVEN)}
    own = {"setting": "digits_uneven", "fid": fid, "membership_auc": 0.5, "memorized_fraction": repeated}
    return kept | own | {"copies_half": half} | shares | control


def test_an_uneven_setting_is_stopped_by_copies_of_what_images_show():
    course = [
        uneven_point("full", 0.5, 20.0, 0.0, half=0.01),
        uneven_point("full", 1, 10.0, 0.01 + TOLERANCE, half=0.1),
        uneven_point("full", 2, 5.0, 0.2, half=0.4),
    ]
    assert stopped(course, "memorized_fraction") is course[1]
    assert stopped(course, "copies_half") is course[0]
    tables = tables_of(summarize([*course, uneven_point("found", 2, 7.5, 0.05, half=0.1)]))
    assert sorted(tables) == ["finetuning digits_uneven", "finetuning digits_uneven equal quality"]
    full, found, control = tables["finetuning digits_uneven"].splitlines()[2:]
    assert full == (
        "| full fine-tuning | 50 % | 5.0 (5.0–5.0) | 20.0 % (40.0) | 0.0 % (0.0) | 0 % | 0.00 / 0.00 "
        "| 10.0 (10.0–10.0), at 1.00 × | 20.0 (20.0–20.0), at 0.50 × | 20 |"
    )
    assert found.endswith("| 7.5 (7.5–7.5), at 2.00 ×; none in 1 runs | 20 |")
    assert found.count("none in 1 runs") == 2
    shares = "*1.0 % (1.0)* | *1.0 % (1.0)* | *1 %*"
    assert control == f"| *held-out images* |  | *0.0* | {shares} | *0.5: chance* |  |  |  |"
    (line,) = tables["finetuning digits_uneven equal quality"].splitlines()[2:]
    assert line.startswith("| the found mask | 7.5 | 5.0 / 10.8 %; -5.8 (-5.8 to -5.8) |")  # half way between two marks


def test_the_search_on_an_uneven_set_chooses_by_the_share_of_copies():
    def trial(mask, fid, copies):
        return {"trial": mask, "kind": "mask", "mask": mask, "share": 0.5, "fid_selection": fid, "copies_half": copies}

    trials = [trial("11", 5.0, 0.2), trial("10", 7.0, 0.012), trial("01", 9.0, 0.0)]
    # Of 80 held-out images none is a copy: one standard error, 1.2 %, is allowed.
    chosen = choose(trials, control=0.0, setting=DIGITS_UNEVEN)
    assert (chosen["mask"], chosen["rule"], chosen["trials"]) == ("10", "control", 3)


def test_names_of_rows_differ():
    names = [row.name for row in (*ROWS, SEARCH)]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(not (ROOT / PAGE).exists(), reason="no page yet")
def test_every_figure_of_the_page_is_in_the_results():
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert "<!-- table: finetuning " in text
    assert fill(text, published_tables()) == text, "renew it: python -m benchmarks.finetuning --preset digits --report"


@pytest.mark.parametrize("preset", [preset for preset in PUBLISHED if (folder_of(preset) / "summary.csv").exists()])
def test_a_published_summary_is_that_of_its_points(preset):
    expected = {(line["row"], line["at"]): line for line in summarize(read_points(folder_of(preset)))}
    found = lines(folder_of(preset) / "summary.csv")
    assert {(line["row"], line["at"]) for line in found} == set(expected)
    for line in found:
        wanted = expected[line["row"], line["at"]]
        for name in ("fid", "mq_0.15", "memorized_fraction", "copies_repeated"):
            assert float(line.get(name) or 0) == pytest.approx(wanted.get(name, 0), rel=1e-4)
