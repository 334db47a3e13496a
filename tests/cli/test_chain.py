"""README's own words for a folder of one's own: the four commands, one after the other, on a few small photographs."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline
from PIL import Image

from lightning_iet.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text()
SOONER = {
    "inspect": [],
    "fit": [
        "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--data.image_size=8",
        "--trainer.enable_progress_bar=false", "--evaluation.pictures=false",
        "--evaluation.num_samples=8", "--evaluation.num_inference_steps=2",
    ],
    "audit-model": ["--num-inference-steps", "2", "--loss-timesteps", "2", "--num-workers", "0", "--device", "cpu"],
    "export": [],
}  # fmt: skip


def commands():
    """README's commands about ``photos`` and what becomes of them, without their comments."""
    (block,) = [
        block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "fit --images photos" in block
    ]
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A dozen and a half photographs of two shapes, in a folder whose name has a space and an umlaut."""
    place = tmp_path / "Bilder für Öle"
    (place / "photos").mkdir(parents=True)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["lightning-iet"])
    random = np.random.default_rng(0)
    for number in range(18):
        height, width = (24, 32) if number % 2 else (32, 24)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"photos/photo {number}.png")


def test_readmes_four_commands_follow_one_another(photos, capsys):
    assert [name for name, *_ in commands()] == list(SOONER)
    for name, *options in commands():
        options = ["8" if option == "256" else option for option in options]
        main([name, *options, *SOONER[name]])
    output = " ".join(capsys.readouterr().out.split())
    assert "18 images, 3 x 64 x 64" in output
    assert "No FID" in output or "FID" in output
    assert {path.name for path in Path("photos-report").iterdir()} >= {"report.html", "metrics.json", "pairs.csv"}
    pipeline = DDPMPipeline.from_pretrained("model")
    assert pipeline.unet.config.in_channels == 3
    assert {path.name for path in Path().iterdir()} == {"photos", "inspection", "runs", "photos-report", "model"}
