"""The benchmark of all methods, in miniature: it runs, it resumes, and it judges as it says."""

import csv
import json
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.mitigation.__main__ import main
from benchmarks.mitigation.dp_sgd import train_privately
from benchmarks.mitigation.points import row_named
from benchmarks.mitigation.runs import Results, Run, carry_out, runs_of
from benchmarks.mitigation.scoring import Judge
from benchmarks.mitigation.settings import PRESETS
from benchmarks.mitigation.training import OutOfTime, train
from lightning_iet.metrics import feature_extractor

SMOKE = PRESETS["smoke"]
DIGITS = SMOKE.settings[0]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke preset, as a user runs it."""
    folder = tmp_path_factory.mktemp("results") / "smoke"
    assert main(["--preset", "smoke", "--out", str(folder), "--jobs", "1"]) == 0
    return folder


def lines(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_run_is_in_the_points_and_every_row_in_the_summary(smoke):
    points, runs = lines(smoke / "points.csv"), runs_of(SMOKE)
    assert {(p["setting"], p["row"], int(p["seed"])) for p in points} == {
        (r.setting.name, r.row.name, r.seed) for r in runs
    }
    summary = lines(smoke / "summary.csv")
    assert {line["row"] for line in summary} >= {r.row.name for r in runs} | {"stopped_on_loss", "stopped_on_fid"}
    for line in summary:
        assert float(line["fid_low"]) <= float(line["fid"]) <= float(line["fid_high"])
        assert 0 <= float(line["memorized_fraction"]) <= 1
        assert line["memorized_fraction_control"] != ""
    assert len(lines(smoke / "equal_quality.csv")) > 0


def test_seeds_versions_machine_and_duration_are_noted(smoke):
    noted = json.loads((smoke / "environment.json").read_text())
    assert noted["seeds"] == [0, 1]
    assert noted["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert noted["minutes"] > 0
    assert noted["peak_memory_gib"] > 0
    assert noted["machine"]["cores"] >= 1


def test_there_is_a_picture_of_each_setting(smoke):
    for setting in SMOKE.settings:
        assert (smoke / f"pareto_{setting.name}.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_left_of_what_results_were_made_of(smoke):
    assert not list((smoke / "work").rglob("*.ckpt"))


def test_the_same_command_again_runs_nothing(smoke):
    before = {file: file.stat().st_mtime_ns for file in (smoke / "runs").rglob("*.json")}
    assert main(["--preset", "smoke", "--out", str(smoke)]) == 0
    assert {file: file.stat().st_mtime_ns for file in (smoke / "runs").rglob("*.json")} == before


def test_a_result_of_other_settings_does_not_count(smoke):
    run = runs_of(SMOKE)[0]
    assert Results(smoke).find(run) is not None
    assert Results(smoke).find(replace(run, setting=replace(run.setting, learning_rate=0.1))) is None


def test_after_the_time_nothing_is_begun_and_the_rest_is_named(tmp_path, capsys):
    assert main(["--preset", "smoke", "--out", str(tmp_path), "--minutes", "1e-9", "--rows", "plain"]) == 1
    assert "4 of 4 runs are left; the same command goes on with them." in capsys.readouterr().out


@pytest.mark.parametrize("row", ["plain", "iet_agc_2"])
def test_a_run_cut_after_every_epoch_has_the_marks_of_a_whole_one(row, tmp_path):
    row = row_named(row)
    whole = train(DIGITS, row, 0, tmp_path / "whole", deadline=None, device="cpu")
    for _ in range(10):
        try:
            cut = train(DIGITS, row, 0, tmp_path / "cut", deadline=time.time() - 1, device="cpu")
            break
        except OutOfTime:
            continue
    assert {mark: cost["steps"] for mark, cost in cut.cost.items()} == {m: c["steps"] for m, c in whole.cost.items()}
    if row.num_shards > 1:  # plain training goes on with new random numbers; shards with their own
        ends = [
            torch.load(tmp_path / name / "00016.ckpt", weights_only=True)["state_dict"] for name in ("whole", "cut")
        ]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_judge_knows_copies_from_noise():
    judge = Judge(DIGITS, row_named("plain"), 0, feature_extractor("digits"))
    train_images = judge.sets.train_set.images
    copies = judge.of_images(train_images[:10].repeat(3, 1, 1, 1))
    assert (copies["memorized_fraction"], copies["copied_images"], copies["mq_0.15"]) == (1, 10 / len(train_images), 1)
    noise = judge.of_images(torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert (noise["memorized_fraction"], noise["copied_images"]) == (0, 0)
    assert noise["fid"] > copies["fid"]


def test_sets_are_disjoint_and_change_with_the_seed():
    def images_of(seed, row="plain"):
        sets = Judge(DIGITS, row_named(row), seed, feature_extractor("digits")).sets
        names = ("train_set", "unseen", "control_set", "selection_set", "reference_set")
        return [{image.numpy().tobytes() for image in getattr(sets, name).images} for name in names]

    first = images_of(0)
    everything = set().union(*first)
    assert len(everything) == sum(map(len, first))
    assert images_of(1)[0] != first[0]
    assert images_of(0, "plain_with_unseen")[0] == first[0] | first[1]


def test_dp_sgd_spends_no_more_than_its_epsilon(tmp_path):
    pytest.importorskip("opacus")
    row = row_named("dp_sgd")
    ((steps, cost),) = train_privately(DIGITS, row, 0, tmp_path).items()
    assert steps == DIGITS.stop
    assert 0.5 * row.epsilon < cost["epsilon"] <= row.epsilon


def test_a_run_that_fails_does_not_end_the_others(tmp_path):
    good = Run(DIGITS, row_named("plain"), 0)
    bad = Run(replace(DIGITS, num_train=5_000), row_named("plain"), 0)
    bad = replace(bad, setting=replace(bad.setting, name="too_many"))
    results = Results(tmp_path)
    with pytest.raises(RuntimeError, match=r"These runs failed:\ntoo_many/plain-0: ValueError: Argument `sizes`"):
        list(carry_out([bad, good], results, jobs=1, deadline=None, device="cpu"))
    assert results.find(good) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rows", "plane"], "Argument `rows` expected names of plain"), (["--report"], "Run the preset first")],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert main(["--preset", "smoke", "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
