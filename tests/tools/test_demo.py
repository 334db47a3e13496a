"""The demonstration: two runs side by side, their table and their picture."""

import json
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from lightning_iet.cli import main
from lightning_iet.search import Job
from lightning_iet.tools import demo as module
from lightning_iet.tools.demo import demo
from tests.helpers.undrawn import drawing

CONFIGS = Path(__file__).parents[2] / "configs"


def test_both_runs_differ_in_the_method_alone():
    plain, protected = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in module.CONFIGS.values())
    assert plain.pop("agc") == {"threshold": 0}
    form = {"criterion": "record", "weigh": "draws", "reference": "held_out", "reference_images": 64}
    assert protected.pop("agc") == form
    for settings in (plain, protected):
        settings["trainer"]["logger"]["init_args"].pop("name")
    assert plain == protected


@pytest.fixture(scope="module")
def finished(tmp_path_factory, warm_executable):
    """As shipped, but for a smaller network, images drawn in fewer steps, and empty pictures of a run."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    small = {}
    for run, name in module.CONFIGS.items():
        settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        settings["evaluation"] |= {"num_inference_steps": 2, "pictures": False}
        settings["model"]["init_args"]["unet"]["init_args"] |= {"block_out_channels": [8, 8], "norm_num_groups": 4}
        small[run] = folder.parent / f"{run}.yaml"
        small[run].write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_executable)
        patch.setattr(module, "CONFIGS", {run: str(path) for run, path in small.items()})
        patch.setattr(module, "_draw", drawing()(module._draw))
        return folder, demo(out=folder, max_epochs=1, seed=3)


def test_it_trains_both_on_the_same_uneven_set(finished):
    folder, reports = finished
    assert list(reports) == ["plain", "protected"]
    for name, report in reports.items():
        assert report == json.loads((folder / name / "metrics.json").read_text())
        assert report["run"]["steps"] == 19
        assert torch.load(folder / name / "checkpoints" / "last.ckpt")["global_step"] == 19
        assert report["data"]["num_train"] == 600
        assert report["data"]["near_duplicates"] >= 200
        assert report["settings"]["seed"] == 3
    plain, protected = reports["plain"]["data"], reports["protected"]["data"]
    for name in ("num_control", "num_held_out"):  # those whose losses steer the training are no control any more
        assert protected.pop(name) == plain.pop(name) - 64 == 336
    assert plain == protected
    assert reports["plain"]["run"]["criterion"] is None
    assert reports["protected"]["run"]["criterion"] == "record"


@pytest.mark.parametrize("epochs", [1, 64, 65, 100, 130])
def test_the_checkpoint_that_is_drawn_is_that_of_the_last_epoch(epochs):
    [option] = [word for word in module._command("plain", epochs, 0) if word.startswith("--trainer.callbacks=")]
    [callback] = json.loads(option.partition("=")[2])
    assert callback["init_args"] == {"every_n_epochs": epochs, "save_on_train_epoch_end": True, "filename": "last"}


def test_it_draws_a_row_of_pairs_for_each(finished):
    folder, _ = finished
    with Image.open(folder / "demo.png") as picture:
        assert picture.width > picture.height > 600
    assert not list(folder.glob("*.log"))


def test_a_copy_is_drawn_as_one_and_the_table_counts_it(finished, capsys, monkeypatch):
    """The picture's title repeats the table's number, which is the evaluation's."""
    _, reports = finished
    changed = json.loads(json.dumps(reports))
    changed["plain"]["generated"] |= {"copied_fraction_of_repeated": 0.05, "copied_fraction_of_others": 0.01}
    module.Console().print(module._table(changed))
    rows = [line for line in capsys.readouterr().out.splitlines() if "plain training" in line]
    assert "20 of 400" in rows[0]
    assert "4 of 400" in rows[0]


def test_a_second_demo_leaves_the_first_alone(finished, monkeypatch, tmp_path):
    folder, _ = finished
    monkeypatch.setattr(module, "_train", lambda jobs, epochs: (tmp_path / "jobs").write_text(str(jobs[0].folder)))
    with pytest.raises(OSError, match=r"metrics\.json"):
        demo(out=folder, max_epochs=1)
    assert (tmp_path / "jobs").read_text() == f"{folder}-1/plain"


def test_a_failed_run_says_where_to_look(tmp_path, monkeypatch, capsys, warm):
    monkeypatch.setitem(module.CONFIGS, "plain", "nowhere.yaml")
    monkeypatch.setitem(module.CONFIGS, "protected", "nowhere.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--out", str(tmp_path / "out"), "--max-epochs", "1"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "nowhere.yaml" in error
    assert "plain.log" in error


def test_sigterm_ends_both_runs(tmp_path):
    waits = "import time; time.sleep(100000)"  # and would never end by itself, for which the demo would wait
    asks = f"import os, signal; os.kill(os.getppid(), signal.SIGTERM); {waits}"
    jobs = [
        Job(number, {}, [sys.executable, "-c", program], tmp_path / str(number), "metrics.json")
        for number, program in enumerate((waits, asks))
    ]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        module._train(jobs, 1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_bar_shows_the_steps_of_both_runs(tmp_path, monkeypatch):
    """The runs end once the bar has shown what they have done."""
    shown = []

    class Bar:
        def show(self, completed):
            shown.append(completed)
            if completed == 57:
                (tmp_path / "go").touch()

    writes = (
        "import os, sys, time\n"
        "options = dict(argument[2:].split('=', 1) for argument in sys.argv[1:])\n"
        "place = os.path.join(options['trainer.logger.save_dir'], options['trainer.logger.version'])\n"
        "open(os.path.join(place, 'metrics.csv'), 'w').write(f'step\\n{STEPS}\\n')\n"
        "while not os.path.exists(GO): time.sleep(0.01)\n"
        "open(os.path.join(place, 'metrics.json'), 'w').write('x')\n"
    ).replace("GO", repr(str(tmp_path / "go")))
    jobs = [
        Job(i, {}, [sys.executable, "-c", writes.replace("STEPS", steps)], tmp_path / str(i), "metrics.json")
        for i, steps in enumerate(("19", "38"))
    ]
    monkeypatch.setattr(module, "progress_bar", lambda *_, **__: nullcontext(Bar()))
    monkeypatch.setattr("lightning_iet.search.jobs._LOOK_AGAIN", 0.05)
    module._train(jobs, 2)
    assert 57 in shown
    assert all(job.is_finished for job in jobs)


def test_less_than_an_epoch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`max_epochs` expected an integer ≥ 1, but got 0"):
        demo(out=tmp_path, max_epochs=0)


def test_the_last_step_is_read_while_a_run_writes(tmp_path):
    file = tmp_path / "metrics.csv"
    assert module._steps(file) == 0
    file.write_text("epoch,step,loss\n")
    assert module._steps(file) == 0
    file.write_text("epoch,step,loss\n0,19,0.5\n1,38,\n")
    assert module._steps(file) == 38
