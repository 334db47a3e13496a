"""The files of sweeps as Weights & Biases runs them, offline: its own agent, without its server."""

import os
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lightning_iet.modules.pretrained import load_any_module
from lightning_iet.tools.export import model_card
from lightning_iet.tools.sweep import figures
from tests.helpers.wandb_files import read_offline_run

CONFIGS = Path(__file__).parents[2] / "configs"
QUICK = [
    "--model.unet.init_args.block_out_channels=[8,8]",
    "--model.unet.init_args.norm_num_groups=4",
    "--trainer.max_epochs=2",
    "--data.num_control=60",
    "--agc.num_bins=1",
    "--averaging.num_shards=2",
    "--averaging.every_n_epochs=1",
    "--evaluation.num_samples=8",
    "--evaluation.num_inference_steps=2",
]


def run_by_agent(command, point, *, name):
    """Runs a point as `wandb agent` does; returns the exit status."""
    from wandb.wandb_agent import Agent

    os.environ["WANDB_SWEEP_ID"] = "local"  # as `wandb agent` sets it
    agent = Agent(None, None, sweep_id="local")  # neither server nor queue: orders come from here
    agent._sweep_command = list(command)
    order = {"type": "run", "run_id": name, "program": None, "args": {key: {"value": point[key]} for key in point}}
    answer = agent._process_command(order)
    assert "exception" not in answer
    return agent._run_processes[name].wait(timeout=200)


@pytest.mark.usefixtures("drawn")
def test_an_agent_runs_the_points_and_everything_is_logged(tmp_path, monkeypatch, warm):
    sweep = yaml.safe_load((CONFIGS / "sweeps" / "agc_threshold.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(CONFIGS)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "digits")
    points = [{"agc.threshold": threshold, "seed_everything": 1} for threshold in (0.0, 0.9)]
    runs = []
    for number, point in enumerate(points):
        drawn = f"--evaluation.pictures={number == 0}"  # once is enough
        assert run_by_agent([*sweep["command"], *QUICK, drawn], point, name=f"point{number}") == 0
        (file,) = Path("runs/wandb").glob(f"offline-run-*-point{number}/run-point{number}.wandb")
        run = read_offline_run(file)
        runs.append(run)
        assert run.exit_code == 0
        assert run.config.items() >= point.items()

        folder = Path(f"runs/digits/point{number}")  # ours: metrics.json, pictures, checkpoints
        config = yaml.safe_load((folder / "config.yaml").read_text())  # its own, not that of the run before
        assert config["agc"]["threshold"] == point["agc.threshold"]
        card = model_card(
            load_any_module(folder / "checkpoints" / "last.ckpt"),
            ckpt=folder / "checkpoints" / "last.ckpt", use_ema=True, sampler="ddpm", name="model",
        )  # fmt: skip
        assert f"| anti-gradient control | {'threshold 0.9' if number else 'off'} |" in card
        logged = {key: value for key, value in run.summary.items() if isinstance(value, float | int)}
        assert logged.items() >= {f"eval/{key}": value for key, value in figures(folder).items()}.items()
        thresholds = (0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
        names = ["fid", "memorized_fraction", *(f"mq_{threshold}" for threshold in thresholds)]
        wanted = {f"eval/{name}{suffix}" for name in names for suffix in ("", "_control")}
        further = {f"eval/{name}" for name in ("objective", "skip_rate", "fid_train", "membership_inference_auc")}
        assert logged.keys() >= wanted | further | {sweep["metric"]["name"]}

        for picture in ("samples", "nearest", "curves", "mq") if number == 0 else ():
            (name,) = run.summary[f"eval/{picture}"]["filenames"]
            with Image.open(file.parent / "files" / name) as shown, Image.open(folder / f"{picture}.png") as ours:
                assert shown.size == ours.size
        for curve in ("train/loss", "agc/skip_rate"):
            assert [row["epoch"] for row in run.history if curve in row] == [0, 1]
    assert runs[0].summary["eval/skip_rate"] == 0 < runs[1].summary["eval/skip_rate"]
    assert len(list(Path("runs").rglob("metrics.json"))) == len(points)
    assert not Path("runs/config.yaml").exists()
