import csv
import json
import math
import os

import pytest
from PIL import Image

from lightning_iet.plots import RunPoint
from lightning_iet.tools import compare as module
from lightning_iet.tools.compare import compare

THRESHOLDS = ("0.15", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9")


def report(fid=1.4, fraction=0.9, *, data=None, settings=None, **run):
    drawn = {"num_samples": 512, "sampler": "ddim", "num_inference_steps": 50, "use_ema": True, "features": "digits"}
    return {
        "settings": drawn | (settings or {}),
        "data": {"train_sha256": "a", "reference_sha256": "b"} | (data or {}),
        "run": {"num_shards": 1, "threshold": 0.0, "skip_rate": 0.0, "epochs": 10, "steps": 8000, "seconds": 90.5}
        | run,
        "generated": {"fid": fid, "memorized_fraction": fraction, "mq": dict.fromkeys(THRESHOLDS, fraction)},
        "control": {"fid": 0.6, "memorized_fraction": 0.01, "mq": {a: float(a) / 2 for a in THRESHOLDS}},
        "train": {"fid": 0.93},
    }


def store(folder, content):
    folder.mkdir(parents=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "metrics.json").write_text(text)
    return folder


@pytest.fixture
def runs(tmp_path):
    store(tmp_path / "baseline" / "version_0", report())
    store(tmp_path / "iet_agc" / "version_0", report(3.1, 0.004, num_shards=4, threshold=0.5, skip_rate=0.13))
    return [tmp_path / "baseline", tmp_path / "iet_agc"]


def test_rows_hold_the_figures_of_each_run_and_of_its_control(tmp_path, runs):
    rows = compare(runs, out=tmp_path / "out")
    assert [row["run"] for row in rows] == ["baseline", "iet_agc"]
    assert [row["fid"] for row in rows] == [1.4, 3.1]
    assert [row["memorized_fraction"] for row in rows] == [0.9, 0.004]
    assert [row["memorized_fraction_control"] for row in rows] == [0.01, 0.01]
    assert [row["mq_0.3_control"] for row in rows] == [0.15, 0.15]
    assert [(row["shards"], row["threshold"], row["skip_rate"]) for row in rows] == [(1, 0.0, 0.0), (4, 0.5, 0.13)]
    assert [(row["fid_control"], row["fid_train"], row["steps"]) for row in rows] == [(0.6, 0.93, 8000)] * 2


@pytest.mark.usefixtures("drawn")
def test_files_hold_the_same_figures(tmp_path, runs):
    rows = compare(runs, out=tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"comparison.csv", "comparison.md", "comparison.png"}
    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        stored = list(csv.DictReader(file))
    assert stored == [{name: str(value) for name, value in row.items()} for row in rows]
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert lines[2][:3] == ["baseline version_0", "1.40", "90.0%"]
    assert lines[3][:3] == ["control", "0.600", "1.0%"]
    assert lines[4][:3] == ["iet_agc version_0", "3.10", "0.4%"]
    with Image.open(tmp_path / "out" / "comparison.png") as image:
        assert image.size == (1380, 660)


def test_table_is_printed(tmp_path, runs, capsys):
    compare(runs, out=tmp_path / "out")
    printed = capsys.readouterr().out
    for text in ("baseline", "iet_agc", "control", "90.0%", "13.0%", "8,000", "0:01:30", "comparison.csv"):
        assert text in printed


def test_a_path_may_be_a_version_its_parent_or_the_file(tmp_path, runs):
    version = tmp_path / "baseline" / "version_0"
    found = [compare([path], out=tmp_path / "out")[0] for path in (version, version.parent, version / "metrics.json")]
    assert [row["folder"] for row in found] == [str(version)] * 3
    assert compare([str(version)], out=str(tmp_path / "out"))[0]["run"] == "baseline"


def test_of_several_versions_the_newest_finished_one_counts(tmp_path, runs):
    for version, fid in ((10, 10.0), (2, 2.0), (9, 9.0)):
        store(tmp_path / "baseline" / f"version_{version}", report(fid))
    (tmp_path / "baseline" / "version_11").mkdir()  # still at work
    assert compare(runs[:1], out=tmp_path / "out")[0]["fid"] == 10.0


def test_of_several_run_ids_the_one_written_last_counts(tmp_path):
    for age, name in enumerate(("zeta", "beta", "eta")):
        folder = store(tmp_path / "project" / name, report(fid=age + 1.0))
        os.utime(folder / "metrics.json", (1000 - age, 1000 - age))
    assert compare([tmp_path / "project"], out=tmp_path / "out")[0]["run"] == "zeta"


def test_labels_tell_runs_apart(tmp_path, runs):
    store(tmp_path / "baseline" / "version_1", report(1.5))
    versions = [tmp_path / "baseline" / f"version_{number}" for number in (0, 1)]
    assert [row["run"] for row in compare(versions, out=tmp_path / "out")] == [
        "baseline/version_0",
        "baseline/version_1",
    ]
    other = store(tmp_path / "sweep" / "baseline" / "version_0", report(1.6))
    labels = [row["run"] for row in compare([versions[0], other], out=tmp_path / "out")]
    assert len(set(labels)) == 2


def test_a_run_named_twice_stands_there_once(tmp_path, runs):
    assert len(compare([*runs, runs[0], runs[0] / "version_0"], out=tmp_path / "out")) == 2


@pytest.mark.usefixtures("drawn")
def test_a_figure_that_is_not_known_leaves_a_gap(tmp_path):
    run = store(tmp_path / "run", report(skip_rate=None))
    assert compare([run], out=tmp_path / "out")[0]["skip_rate"] is None


def test_other_drawing_settings_are_noted(tmp_path, runs, capsys):
    compare(runs, out=tmp_path / "out")
    assert "different settings" not in " ".join(capsys.readouterr().out.split())
    store(tmp_path / "few" / "version_0", report(settings={"num_samples": 16}))
    compare([*runs, tmp_path / "few"], out=tmp_path / "out")
    assert "different settings" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"expected a metrics.json written by `lightning-iet fit`, but got '.*/odd/metrics.json' \(Expecting"),
        ("[]", "expected a metrics.json written by"),
        ("{}", "no entry 'generated'"),
        (report(fid=None), "no figure for 'fid'"),
        (report(data={"train_sha256": "other"}), "expected runs trained on the same images, but got '.*' and '.*/odd'"),
        (report(data={"reference_sha256": "other"}), "expected runs with the same reference images of FID"),
        (report(settings={"features": "inception"}), "expected runs with FID in the same features"),
    ],
)
def test_bad_runs_give_one_clear_line_and_no_files(tmp_path, runs, content, message):
    odd = store(tmp_path / "odd", content)
    with pytest.raises(ValueError, match=f"^Argument `runs` .*{message}") as error:
        compare([*runs, odd], out=tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_missing_runs(tmp_path, runs):
    with pytest.raises(
        FileNotFoundError, match=r"^Argument `runs` expected .*, but got '.*/nowhere', which does not exist"
    ):
        compare([tmp_path / "nowhere"], out=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"^Argument `runs` expected .*, but got '.*/empty' without a metrics.json"
    ):
        compare([*runs, tmp_path / "empty"], out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"^Argument `runs` expected at least one"):
        compare([], out=tmp_path / "out")


def test_unwritable_folder(tmp_path, runs):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^Argument `out` expected a folder that can be written"):
        compare(runs, out=tmp_path / "file")


def test_a_failure_leaves_the_old_comparison(tmp_path, runs):
    compare(runs, out=tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    store(tmp_path / "broken", report(fid=math.nan))  # no JSON that we write, but Python reads it
    with pytest.raises(ValueError, match="no figure for 'fid'"):
        compare([*runs, tmp_path / "broken"], out=tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def uneven_report(fid, copied, course=(), steps=8000):
    content = report(fid, 0.0, steps=steps)
    content["generated"]["copied_fraction"] = copied
    content["control"]["copied_fraction"] = 0.002
    return content | {
        "course": [
            {
                "step": step,
                "fid": f,
                "memorized_fraction": 0.0,
                "copied_fraction": c,
                "mq": dict.fromkeys(THRESHOLDS, 0.3),
            }
            for step, f, c in course
        ]
    }


def test_copies_count_near_duplicates_once_and_the_course_is_a_line(tmp_path, capsys, monkeypatch):
    shown, draw = {}, module.runs_against_fid

    def watch(runs, **options):
        shown.update(options, runs=runs)
        return draw(runs, **options)

    monkeypatch.setattr(module, "runs_against_fid", watch)
    course = [(2000, 9.0, 0.0), (4000, 5.0, 0.02), (8000, 4.0, 0.1)]
    store(tmp_path / "plain", uneven_report(4.0, 0.1, course))
    store(tmp_path / "record", uneven_report(3.9, 0.005))
    rows = compare([tmp_path / "plain", tmp_path / "record"], out=tmp_path / "out")
    assert [row["copied_fraction"] for row in rows] == [0.1, 0.005]
    assert shown["runs"] == {
        "plain": RunPoint(4.0, [0.1, 0.0], [(9.0, [0.0, 0.3]), (5.0, [0.02, 0.3])]),
        "record": RunPoint(3.9, [0.005, 0.0], []),
    }
    assert shown["control"] == RunPoint(0.6, [0.002, 0.1], [])
    assert "copies" in shown["measures"][0]
    assert "MQ < 0.2" in shown["measures"][1]
    printed = capsys.readouterr().out
    assert "copies" in printed
    assert "10.0%" in printed


def test_among_files_without_copies_the_memorized_fraction_is_compared(tmp_path, runs, capsys):
    store(tmp_path / "new", uneven_report(4.0, 0.1))
    rows = compare([*runs, tmp_path / "new"], out=tmp_path / "out")
    assert "copied_fraction" not in rows[0]
    assert "memorized" in capsys.readouterr().out


@pytest.mark.usefixtures("drawn")
def test_runs_without_fid_are_compared_too(tmp_path, capsys):
    for name in ("a", "b"):
        content = report(fid=None, settings={"features": None})
        content["control"]["fid"] = content["train"]["fid"] = None
        store(tmp_path / name, content)
    rows = compare([tmp_path / "a", tmp_path / "b"], out=tmp_path / "out")
    assert [row["fid"] for row in rows] == [None, None]
    assert "FID was not measured" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "out" / "comparison.png").is_file()


def test_a_terminal_of_80_columns_shows_names_and_figures_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"{number:03d}-agc.threshold=0.{number},seed_everything={number}" for number in range(3)]
    for name in names:
        store(tmp_path / "sweep" / name / "version_12", report(skip_rate=0.1234))
    compare([tmp_path / "sweep" / name for name in names], out=tmp_path / "out")
    printed = capsys.readouterr().out
    first = "".join(line[:21].strip() for line in printed.splitlines())
    assert all(name in first for name in names)
    assert first.count("version_12") == 3
    assert "…" not in printed
    for figure in ("90.0%", "12.3%", "8,000", "0:01:30"):
        assert printed.count(figure) >= 3
