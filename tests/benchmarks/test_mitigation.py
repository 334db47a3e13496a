"""The benchmark of all methods, in miniature: it runs, it resumes, and it judges as it says."""

import csv
import json
import time
from contextlib import chdir
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import pytest
import torch
from filelock import FileLock

from benchmarks.mitigation.__main__ import main
from benchmarks.mitigation.data import Sets
from benchmarks.mitigation.features import prepare_features
from benchmarks.mitigation.points import row_named
from benchmarks.mitigation.runs import Results, Run, _carry_out_one, carry_out, runs_of
from benchmarks.mitigation.scoring import Judge
from benchmarks.mitigation.settings import PRESETS
from benchmarks.mitigation.training import OutOfTime, train
from lightning_iet.metrics import feature_extractor
from tests.helpers.distributed import forking
from tests.helpers.fashion import write_fashion

DIGITS = PRESETS["smoke"].settings[0]
SMOKE = replace(  # half as long, and without mirrored images, on which a run below trains
    PRESETS["smoke"],
    rows=PRESETS["smoke"].rows | {"fashion_mnist": ("plain",)},
    settings=tuple(replace(one, lengths=(1,), plain_lengths=(0.5, 1)) for one in PRESETS["smoke"].settings),
)


@pytest.fixture(scope="module", autouse=True)
def _short():
    """Shorter runs, and in this process fewer losses of a checkpoint, which no test reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "smoke", SMOKE)
        patch.setattr("benchmarks.mitigation.scoring.TIMESTEPS", 2)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to work in, with random clothes in the place of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("place")
    write_fashion(folder / "data", train=300, test=200)
    with chdir(folder):
        yield folder


@pytest.fixture(scope="module")
def _forks():
    """The processes of runs need no time to import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.mitigation.runs.get_context", lambda method: forking())
        yield


@pytest.fixture(scope="module")
def smoke(place, _forks):
    """The smoke preset, as a user runs it."""
    folder = place / "of smoke"
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
    assert noted["versions"]["torch"] == version("torch")
    assert noted["command"] == "python -m benchmarks.mitigation --preset smoke"
    assert 0 < noted["core_minutes"] < noted["minutes"]  # of training, in one process
    assert 0.2 < noted["peak_memory_gib"] < 4
    assert noted["machine"]["cores"] >= 1


def test_there_is_a_picture_of_each_setting(smoke):
    for setting in SMOKE.settings:
        assert (smoke / f"pareto_{setting.name}.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_left_of_what_results_were_made_of(smoke):
    assert not list((smoke / "unfinished").rglob("*.ckpt"))


def test_the_same_command_again_runs_nothing_and_some_rows_lose_nothing(smoke):
    points = (smoke / "points.csv").read_bytes()
    before = {file: file.stat().st_mtime_ns for file in (smoke / "runs").rglob("*.json")}
    assert main(["--preset", "smoke", "--out", str(smoke)]) == 0
    assert main(["--preset", "smoke", "--out", str(smoke), "--rows", "iet_agc_2", "--settings", "digits"]) == 0
    assert (smoke / "points.csv").read_bytes() == points
    assert {file: file.stat().st_mtime_ns for file in (smoke / "runs").rglob("*.json")} == before


def test_only_some_settings():
    runs = runs_of(PRESETS["uneven"], rows={"plain", "record_draws"}, settings={"uneven_digits"})
    assert [run.name for run in runs] == [
        f"uneven_digits/{row}-{seed}" for seed in (0, 1, 2) for row in ("plain", "record_draws")
    ]


@pytest.mark.parametrize(
    "setting",
    [s for p in PRESETS.values() for s in p.settings if s.source == "digits"],
    ids=lambda setting: setting.name,
)
def test_there_are_digits_enough_for_every_setting(setting):
    sets = Sets(setting, row_named("plain"), seed=0)
    assert len(sets.every_image) == setting.num_train + setting.num_repeated * setting.repeats


def test_a_result_of_other_settings_does_not_count(smoke):
    run = runs_of(SMOKE)[0]
    assert Results(smoke).find(run) is not None
    assert Results(smoke).find(replace(run, setting=replace(run.setting, learning_rate=0.1))) is None


def test_after_the_time_nothing_is_begun_and_the_rest_is_named(place, tmp_path, capsys):
    assert main(["--preset", "smoke", "--out", str(tmp_path), "--minutes", "1e-9", "--rows", "plain"]) == 1
    assert "4 of 4 runs are left; the same command goes on with them." in capsys.readouterr().out


def test_two_processes_do_not_share_a_folder(tmp_path, capsys):
    (tmp_path / "unfinished").mkdir()
    with FileLock(tmp_path / "unfinished" / "lock"):
        assert main(["--preset", "smoke", "--out", str(tmp_path)]) == 2
    assert "Argument `out` expected a folder where nobody is at work" in capsys.readouterr().err


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
    assert {mark: cost["steps"] for mark, cost in cut.items()} == {mark: cost["steps"] for mark, cost in whole.items()}
    assert train(DIGITS, row, 0, tmp_path / "cut", deadline=0, device="cpu") == cut  # what is done is not done again
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


@pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Optimal order is the")  # Opacus', of every user
@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_dp_sgd_spends_no_more_than_its_epsilon(tmp_path, monkeypatch):
    engine = pytest.importorskip("opacus.privacy_engine")
    from opacus.accountants import RDPAccountant

    row = row_named("dp_sgd")
    # Opacus looks for the noise by halves, half a second each, until epsilon is within a hundredth.
    rough = partial(engine.get_noise_multiplier, epsilon_tolerance=0.1 * row.epsilon)
    monkeypatch.setattr(engine, "get_noise_multiplier", rough)
    # It begins with a bound by 150 orders of Rényi's; by a few it is less narrow, and what is found is the same.
    monkeypatch.setattr(RDPAccountant, "DEFAULT_ALPHAS", [2, 3, 4, 6, 8, 12, 16, 24, 32, 63])
    found = _carry_out_one(Run(DIGITS, row, 0), tmp_path, None, "cpu")
    (point,) = found["points"]
    assert point["steps"] == DIGITS.stop
    assert 0.5 * row.epsilon < point["epsilon"] <= row.epsilon
    assert point["memorized_fraction"] <= 1


def test_mirrored_copies_are_copies_where_mirrored_images_were_trained_on():
    judges = {
        name: Judge(DIGITS, row_named(name), 0, feature_extractor("digits")) for name in ("plain", "dropout_flips")
    }
    mirrored = judges["plain"].sets.train_set.images[:20].flip(-1)
    found = {name: judge.of_images(mirrored)["memorized_fraction"] for name, judge in judges.items()}
    assert found["dropout_flips"] == 1
    assert found["plain"] < 0.5


def test_other_settings_do_not_go_on_with_what_is_unfinished():
    run = runs_of(SMOKE)[0]
    assert run.folder == runs_of(SMOKE)[0].folder
    assert run.folder != replace(run, setting=replace(run.setting, learning_rate=0.1)).folder


def test_the_gpu_preset_runs_on_a_cpu_at_small_size(place):
    setting = replace(
        PRESETS["gpu"].settings[0], channels=(8, 16), num_train=26, batch_size=13, stop=4, lengths=(1,),
        plain_lengths=(1,), num_samples=8, inference_steps=2, num_control=16, num_selection=16, num_reference=32,
        warmup=2, num_feature_images=100,
    )  # fmt: skip
    runs = [Run(setting, row_named(name), 0) for name in ("plain", "iet_anchored")]
    results = Results(place / "gpu")
    prepare_features(setting, results.unfinished)
    for run in runs:
        results.keep(run, _carry_out_one(run, results.unfinished, None, "cpu"))
    assert all(results.find(run)["points"][0]["steps"] >= 4 for run in runs)


@pytest.mark.usefixtures("_forks")
def test_a_run_that_fails_does_not_end_the_others(tmp_path):
    good = Run(DIGITS, row_named("dropout_flips"), 0)
    bad = Run(replace(DIGITS, num_train=5_000), row_named("plain"), 0)
    bad = replace(bad, setting=replace(bad.setting, name="too_many"))
    results = Results(tmp_path)
    with pytest.raises(RuntimeError, match=r"These runs failed:\ntoo_many/plain-0: ValueError: Argument `sizes`"):
        list(carry_out([bad, good], results, jobs=1, deadline=None, device="cpu"))
    assert results.find(good) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "plane"], "Argument `rows` expected names of plain"),
        (["--settings", "figures"], "Argument `settings` expected names of digits, fashion_mnist, but got figures."),
        (["--without", "plane"], "Argument `rows` expected names of plain"),
        (["--report"], "Run the preset first"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert main(["--preset", "smoke", "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
