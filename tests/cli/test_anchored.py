"""The configurations of anchored AGC, and its options on the command line."""

import json
import sys
from pathlib import Path

import pytest

from lightning_iet.cli import main
from tests.helpers.command_line import QUICK


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-iet"])


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    ("name", "reference", "options"),
    [
        ("anchored_agc", "held_out", ["--agc.reference_every", "1"]),
        ("iet_anchored_agc", "other_shards", ["--agc.reference_batch_size", "30", "--agc.reference_every", "1"]),
        ("baseline", "held_out", ["--agc.reference", "held_out", "--agc.reference_images", "20"]),
    ],
)
def test_configurations_and_options(name, reference, options):
    config = Path(__file__).parents[2] / f"configs/digits/{name}.yaml"
    main(["fit", "--config", str(config), *QUICK, *options, "--evaluation.num_samples=4", "--evaluation.k=2"])
    folder = Path(f"runs/digits/{name}/version_0")
    run = json.loads((folder / "metrics.json").read_text())["run"]
    assert run["reference"] == reference
    assert run["threshold"] == (0 if name == "baseline" else 0.5)
    assert isinstance(run["gap"], float)
    assert (folder / "gap.png").is_file()


def test_other_shards_without_shards_is_one_line(capsys):
    config = Path(__file__).parents[2] / "configs/digits/agc.yaml"
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), *QUICK, "--agc.reference", "other_shards"])
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "expected shards in a ShardedDataModule" in error
    assert "Traceback" not in error
