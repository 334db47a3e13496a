"""Sweeps: with a program that takes no time in place of training; a real one once."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import optuna
import pytest
import yaml

from lightning_iet.cli import main
from lightning_iet.search import Job, run_jobs
from lightning_iet.tools import sweep as module
from lightning_iet.tools.sweep import figures, sweep

PROGRAM = """
import json, os, sys
options = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
folder = os.path.join(options["trainer.logger.save_dir"], options["trainer.logger.version"])
a, b = float(options["model.a"]), int(options.get("seed", 0))
with open(os.path.join(options["trainer.logger.save_dir"], "calls"), "a") as calls:
    calls.write(f"{a} {b} {os.environ['OMP_NUM_THREADS']}\\n")
if a == 0.5 and not os.path.exists("mended"):
    print("working ...")
    sys.exit("error: a must not be 0.5")
blind = os.path.exists("blind")
part = {"num_images": 4, "fid": None if blind else (a - 0.3) ** 2 + 1, "memorized_fraction": a / 10, "mq": {"0.15": a, "0.3": a}, "further": {"mifid": a}}
json.dump({
    "version": "0", "settings": {"features": None if blind else "digits", "num_samples": 4, "sampler": "ddim", "num_inference_steps": 2, "use_ema": True},
    "data": {"train_sha256": "x", "reference_sha256": "y"},
    "run": {"num_shards": 1, "threshold": a, "skip_rate": 0.25, "epochs": 1, "steps": 2, "seconds": 3.0},
    "generated": part, "control": part | {"memorized_fraction": 0.0, "further": {}}, "train": {"fid": None if blind else 0.5},
}, open(os.path.join(folder, "metrics.json"), "w"))
"""  # noqa: E501


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)

    def write(**changes):
        content = {
            "name": "try",
            "method": "grid",
            "metric": {"name": "eval/fid", "goal": "minimize"},
            "command": [sys.executable, str(tmp_path / "program.py"), "${args}"],
            "parameters": {"model.a": {"values": [0.3, 0.5, 0.7]}, "seed": {"values": [1, 2]}},
        }
        path = tmp_path / "try.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write


def calls(tmp_path):
    return sorted((tmp_path / "out" / "try" / "calls").read_text().splitlines())


@pytest.mark.usefixtures("drawn")
def test_a_failed_run_does_not_end_the_sweep_and_is_tried_again(tmp_path, file, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sweep([file()], jobs=2, out=tmp_path / "out")
    threads = max(1, (os.cpu_count() or 1) // 2)
    assert calls(tmp_path) == [f"{a} {seed} {threads}" for a in (0.3, 0.5, 0.7) for seed in (1, 2)]
    said = capsys.readouterr().out
    assert said.count("error: a must not be 0.5") == 2
    assert "try: 6 runs, 2 at a time." in said
    assert "Best by eval/fid: 000-a=0.3,seed=1 (1)." in said
    assert "Best FID among the 4 of 4 runs" in said
    folder = tmp_path / "out" / "try"
    with (folder / "sweep.csv").open(newline="") as rows:
        table = list(csv.DictReader(rows))
    assert [row["run"] for row in table] == [
        "000-a=0.3,seed=1", "001-a=0.3,seed=2", "004-a=0.7,seed=1", "005-a=0.7,seed=2",
    ]  # fmt: skip
    assert float(table[2]["fid"]) == pytest.approx(1.16)
    assert float(table[2]["objective"]) == pytest.approx(1.16 * 1.7)
    assert float(table[2]["mifid"]) == 0.7
    assert (folder / "comparison.png").is_file()

    (tmp_path / "mended").touch()
    sweep([file()], jobs=1, out=tmp_path / "out")
    assert len(calls(tmp_path)) == 8  # the two that had failed, and no other
    assert len(list(folder.glob("*/metrics.json"))) == 6


def test_the_number_of_threads_that_the_user_has_set_is_kept(tmp_path, file, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    sweep([file(parameters={"model.a": {"values": [0.3]}, "seed": {"value": 1}})], jobs=2, out=tmp_path / "out")
    assert calls(tmp_path) == ["0.3 1 3"]


def table(tmp_path):
    with (tmp_path / "out" / "try" / "sweep.csv").open(newline="") as rows:
        return [row["run"] for row in csv.DictReader(rows)]


@pytest.mark.parametrize("method", ["grid", "random"])
def test_runs_of_another_command_are_neither_taken_for_ones_own_nor_overwritten(tmp_path, file, method):
    command = [sys.executable, str(tmp_path / "program.py"), "${args}"]
    options = {"method": method, "run_cap": 1, "parameters": {"model.a": {"values": [0.3]}, "seed": {"values": [1]}}}
    sweep([file(**options)], out=tmp_path / "out")
    expected = rf"expected .*command.*program\.py.*{'name' if method == 'grid' else 'folder'}"
    with pytest.raises(ValueError, match=expected) as error:
        sweep([file(command=[*command, "--further=1"], **options)], out=tmp_path / "out")
    assert "\n" not in str(error.value)
    assert calls(tmp_path) == ["0.3 1 " + calls(tmp_path)[0].split()[2]]
    sweep([file(**options)], out=tmp_path / "out")  # goes on
    assert len(calls(tmp_path)) == 1


def test_a_search_whose_study_is_lost_refuses_runs_of_another_command(tmp_path, file):
    options = {"method": "random", "parameters": {"model.a": {"values": [0.3]}}}
    sweep([file(**options)], out=tmp_path / "out", trials=1)
    for database in (tmp_path / "out" / "try").glob("search.db*"):
        database.unlink()
    other = [sys.executable, str(tmp_path / "program.py"), "--seed=7", "${args}"]
    with pytest.raises(
        ValueError, match=r"expected runs of its own command in .*, but got '000-a=0.3', which is one of"
    ):
        sweep([file(command=other, **options)], out=tmp_path / "out", trials=1)
    assert len(calls(tmp_path)) == 1


@pytest.mark.parametrize("method", ["grid", "random"])
def test_runs_of_a_version_that_kept_no_command_count(tmp_path, file, method):
    options = {"method": method, "run_cap": 1, "parameters": {"model.a": {"values": [0.3]}, "seed": {"values": [1]}}}
    sweep([file(**options)], out=tmp_path / "out")
    (tmp_path / "out" / "try" / "000-a=0.3,seed=1" / "command.json").unlink()
    if method == "random":
        study = optuna.load_study(study_name="try", storage=f"sqlite:///{tmp_path / 'out' / 'try' / 'search.db'}")
        facts = study.user_attrs["space"]
        study.set_user_attr("space", {name: value for name, value in facts.items() if name != "command"})
    sweep([file(**options)], out=tmp_path / "out")
    assert len(calls(tmp_path)) == 1
    if method == "random":  # which has taken the command over
        with pytest.raises(ValueError, match="expected command"):
            sweep([file(command=["other", "${args}"], **options)], out=tmp_path / "out")


def test_values_may_be_added_to_a_grid_and_taken_away(tmp_path, file):
    def of(*values):
        return file(parameters={"model.a": {"values": [*values]}, "seed": {"value": 1}})

    sweep([of(0.3, 0.7)], out=tmp_path / "out")
    assert table(tmp_path) == ["000-a=0.3,seed=1", "001-a=0.7,seed=1"]
    sweep([of(0.1, 0.3, 0.7)], out=tmp_path / "out")
    assert [call.split()[0] for call in calls(tmp_path)] == ["0.1", "0.3", "0.7"]  # each once
    assert table(tmp_path) == ["000-a=0.1,seed=1", "000-a=0.3,seed=1", "001-a=0.7,seed=1"]
    sweep([of(0.1, 0.7)], out=tmp_path / "out")
    assert len(calls(tmp_path)) == 3
    assert table(tmp_path) == ["000-a=0.1,seed=1", "001-a=0.7,seed=1"]  # what is not asked for is left out


def test_a_search_goes_on_where_it_ended(tmp_path, file):
    path = file(method="bayes", parameters={"model.a": {"min": 0.0, "max": 1.0}}, metric={"name": "eval/objective"})
    sweep([path], out=tmp_path / "out", trials=3)
    first = {run.parent.name for run in (tmp_path / "out" / "try").glob("*/metrics.json")}
    sweep([path], out=tmp_path / "out", trials=5)
    runs = {run.parent.name for run in (tmp_path / "out" / "try").glob("*/metrics.json")}
    assert (len(first), len(runs)) == (3, 5)
    assert first < runs
    assert len(set(calls(tmp_path))) == 5  # no point twice


def test_failed_runs_of_a_search_are_tried_again(tmp_path, file):
    path = file(method="random", parameters={"model.a": {"values": [0.5]}})
    with pytest.raises(ValueError, match=r"all of .* failed"):
        sweep([path], out=tmp_path / "out", trials=2)
    (tmp_path / "mended").touch()
    for _ in range(2):
        sweep([path], out=tmp_path / "out", trials=2)
    assert len(calls(tmp_path)) == 2 + 2  # each once more
    assert len(list((tmp_path / "out" / "try").glob("*/metrics.json"))) == 2


def test_runs_without_fid_are_not_run_again(tmp_path, file, capsys):
    (tmp_path / "blind").touch()
    path = file(method="random", parameters={"model.a": {"min": 0.0, "max": 1.0}}, metric={"name": "eval/objective"})
    for _ in range(3):
        sweep([path], out=tmp_path / "out", trials=2)
    assert len(calls(tmp_path)) == len(list((tmp_path / "out" / "try").glob("*/metrics.json"))) == 2
    assert "try: 2 runs, 2 of which have finished" in capsys.readouterr().out


def test_a_sweep_over_options_of_the_data_ends_with_its_best(tmp_path, file, capsys, monkeypatch):
    """Runs on other images stand in no table of `compare`."""
    (tmp_path / "program.py").write_text(PROGRAM.replace('"train_sha256": "x"', '"train_sha256": str(b)'))
    path = file(parameters={"model.a": {"values": [0.3]}, "seed": {"values": [1, 2]}})
    sweep([path], out=tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    assert "No table, and no best FID among the runs that do not copy: Argument `runs` expected runs trained on" in said
    assert "Best by eval/fid: 000-a=0.3,seed=1 (1)." in said
    assert len(table(tmp_path)) == 2

    def interrupted(jobs, number, *, ended):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_jobs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep([path], out=tmp_path / "out")
    assert "Interrupted: 2 of 2 runs have finished." in " ".join(capsys.readouterr().out.split())


def test_a_grid_ends_after_so_many_runs_as_its_file_says(tmp_path, file, capsys):
    sweep([file(run_cap=2, parameters={"model.a": {"values": [0.3, 0.4, 0.7]}})], out=tmp_path / "out")
    assert table(tmp_path) == ["000-a=0.3", "001-a=0.4"]
    assert "try: 2 runs, 1 at a time." in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"`trials` expected a sweep of method random or bayes, .*`run_cap`") as error:
        sweep([file()], out=tmp_path / "out", trials=2)
    assert "\n" not in str(error.value)


def test_bad_input(tmp_path, file):
    for arguments, message in (
        ({"jobs": 0}, "`jobs` expected an integer ≥ 1"),
        ({"trials": 0}, "`trials` expected an integer ≥ 1, but got 0"),
        ({"trials": -1}, "`trials` expected an integer ≥ 1, but got -1"),
        ({"out": tmp_path / "try.yaml"}, "`out` expected a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep([file()], **arguments)
    for method, others in (("grid", {}), ("random", {"parameters": {"model.a": {"values": [0.3]}}})):
        trials = None if method == "grid" else 2
        path = file(name=method, method=method, metric={"name": "eval/fidd"}, **others)
        with pytest.raises(ValueError, match=r"expected a metric among .*, but got eval/fidd. Did you mean eval/fid\?"):
            sweep([path], out=tmp_path / "out", trials=trials)
        done = tmp_path / "out" / method / "calls"
        assert len(done.read_text().splitlines()) == 1  # the first run told
        sweep([file(name=method, method=method, **others)], out=tmp_path / "out", trials=trials)  # as the message says
        assert len(done.read_text().splitlines()) == (6 if method == "grid" else 2)  # and the first run has stayed
    with pytest.raises(ValueError, match=r"all of .* failed"):
        sweep([file(name="other", parameters={"model.a": {"value": 0.5}})], out=tmp_path / "out")
    with pytest.raises(ValueError, match="`trials` expected a number of runs"):
        sweep([file(method="random")], out=tmp_path / "out")


def test_the_best_run_is_that_of_the_least_fid_among_those_that_do_not_copy(tmp_path, file, capsys):
    parameters = {"model.a": {"values": [0.3, 1.5, 1.0]}, "seed": {"value": 1}}  # a / 10 of 4 images are copies
    sweep([file(parameters=parameters)], out=tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    assert "The best: lowest FID among the runs whose copies do not exceed those of held-out images" in said
    assert "Best FID among the 3 of 3 runs whose copies do not exceed those of held-out images: 000-a=0.3" in said
    content = yaml.safe_load(
        file(name="other", parameters=parameters | {"model.a": {"values": [3.0, 4.0, 2.0]}}).read_text()
    )
    del content["metric"]
    (tmp_path / "try.yaml").write_text(yaml.safe_dump(content))
    sweep([tmp_path / "try.yaml"], out=tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    assert "also the lowest FID, raised by copies" in said  # what is minimised by default
    assert "Best FID among the 1 of 3 runs whose copies do not exceed those of held-out images: 002-a=2.0" in said
    assert "Best by eval/objective: 002-a=2.0" in said


def test_an_interrupted_sweep_leaves_its_table_and_says_how_to_go_on(tmp_path, file, capsys, monkeypatch):
    def interrupted(jobs, number, *, ended):
        first = next(iter(jobs))
        ended(first, first.run(environment=os.environ))
        raise KeyboardInterrupt

    path = file(parameters={"model.a": {"values": [0.3, 0.4, 0.7]}, "seed": {"value": 1}})
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_jobs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep([path], out=tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    assert "Interrupted: 1 of 3 runs have finished. The same command goes on" in said
    assert len((tmp_path / "out" / "try" / "sweep.csv").read_text().splitlines()) == 2
    sweep([path], out=tmp_path / "out")
    assert "try: 3 runs, 1 of which have finished, 1 at a time." in " ".join(capsys.readouterr().out.split())
    assert len(calls(tmp_path)) == 3


def test_sigterm_ends_the_runs_as_an_interruption_does(tmp_path, file, capsys):
    path = file(parameters={"model.a": {"values": [0.3]}, "seed": {"values": [1, 2, 3]}})
    asks = "if b == 2:\n    import signal, time\n    os.kill(os.getppid(), signal.SIGTERM)\n    time.sleep(100000)\n"
    (tmp_path / "program.py").write_text(PROGRAM.replace("part = ", f"{asks}part = "))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):  # and no run sleeps on, for which the sweep would wait
        sweep([path], out=tmp_path / "out")
    assert signal.getsignal(signal.SIGTERM) is before
    assert "Interrupted: 1 of 3 runs have finished." in capsys.readouterr().out
    assert [call.split()[1] for call in calls(tmp_path)] == ["1", "2"]


def test_a_process_that_starts_while_the_jobs_are_stopped_ends_as_well(tmp_path, monkeypatch):
    stopped = threading.Event()

    class Late(subprocess.Popen):
        def __init__(self, *arguments, **options):
            if "late" in arguments[0]:
                assert stopped.wait(600)
            super().__init__(*arguments, **options)

        def terminate(self):
            super().terminate()
            stopped.set()

    def ended(job, error):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Late)
    waits = "import time; time.sleep(100000)"
    programs = [["pass"], [waits, "late"]]
    jobs = [Job(i, {}, [sys.executable, "-c", *words], tmp_path / str(i), "result") for i, words in enumerate(programs)]
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, 2, ended=ended)


def test_an_exception_ends_the_jobs_that_run(tmp_path):
    def job(number, program):
        return Job(number, {}, [sys.executable, "-c", program], tmp_path / str(number), "result")

    def ended(job, error):
        raise KeyboardInterrupt

    waits = "import time; time.sleep(100000)"  # and would never end by itself
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job(0, "pass"), job(1, waits)], 2, ended=ended)


def test_many_runs_begin_with_an_estimate_from_finished_ones(tmp_path, file, capsys):
    parameters = {"model.a": {"values": [0.3]}, "seed": {"values": [0]}}
    sweep([file(parameters=parameters)], out=tmp_path / "out")
    assert "about" not in capsys.readouterr().out
    parameters["seed"] = {"values": [0, 1, 2, 3, 4]}
    sweep([file(parameters=parameters)], out=tmp_path / "out")
    said = capsys.readouterr().out  # each run says that it took 3 seconds
    assert "try: 5 runs, 1 of which have finished, 1 at a time; about 12 s if each takes 3 s." in said


def test_many_runs_begin_with_the_estimate_of_plan_for_the_first_point(tmp_path, file, capsys, monkeypatch):
    def planned(command, *, env, **options):
        assert command[1:4] == ["-m", "lightning_iet", "plan"]
        assert {"--model.a=0.3", "--seed=1", "--trainer.logger=false"} <= set(command)
        assert env["OMP_NUM_THREADS"] == "3"
        [out] = [word.partition("=")[2] for word in command if word.startswith("--out=")]
        Path(out).write_text('{"seconds": 90}')

    def interrupted(jobs, number, *, ended):
        raise KeyboardInterrupt

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(module.subprocess, "run", planned)
    monkeypatch.setattr(module, "run_jobs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep([file(command=["lightning-iet", "fit", "${args}"])], jobs=4, out=tmp_path / "out")
    said = capsys.readouterr().out
    assert "try: 6 runs, 4 at a time; about 3 min if each takes 2 min." in said  # 4 runs, then 2
    assert "Interrupted: 0 of 6 runs have finished." in said


def test_plan_really_measures_the_first_point_and_a_command_that_fails_has_no_estimate(tmp_path, monkeypatch, warm):
    config = os.path.abspath("configs/digits/agc.yaml")
    monkeypatch.chdir(tmp_path)

    def seconds(*options):
        content = {"method": "grid", "parameters": {"agc.threshold": {"values": [0.0, 0.5]}}}
        content["command"] = ["lightning-iet", "fit", f"--config={config}", *options, "${args}"]
        Path("real.yaml").write_text(yaml.safe_dump(content))
        return module._seconds_of_run(module.read_sweep(Path("real.yaml")), [], jobs=1)

    assert 0 < seconds("--trainer.max_epochs=1") < 600
    assert seconds("--no.such=1") is None
    assert [file.name for file in Path().iterdir()] == ["real.yaml"]


def test_two_points_really_run(tmp_path, monkeypatch, warm):
    config = os.path.abspath("configs/digits/agc.yaml")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "real.yaml"
    quick = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    quick += ["--evaluation.num_samples=4", "--evaluation.num_inference_steps=2"]
    command = ["lightning-iet", "fit", f"--config={config}", "--trainer.logger=WandbLogger", *quick, "${args}"]
    path.write_text(
        yaml.safe_dump(
            {
                "method": "grid",
                "metric": {"name": "eval/fid"},
                "command": command,
                "parameters": {"agc.threshold": {"values": [0.0, 0.5]}},
            }
        )
    )
    main(["sweep", str(path), "--jobs", "2", "--out", "runs"])
    runs = sorted((tmp_path / "runs" / "real").glob("*/metrics.json"))
    assert [json.loads(run.read_text())["run"]["threshold"] for run in runs] == [0.0, 0.5]
    assert {"fid", "memorized_fraction", "mq_0.15", "skip_rate", "objective"} <= set(figures(runs[1].parent))
    assert not (tmp_path / "wandb").exists()
