"""Fashion-MNIST end to end: a few hundred images of 32 × 32, two shards, trained and evaluated by one command."""

import json
import sys

import pytest
import torch
from PIL import Image
from torch import nn

from lightning_iet.cli import main
from lightning_iet.metrics import features
from tests.helpers.fashion import write_fashion

CONFIG = """
model:
  class_path: DiffusionModule
  init_args:
    unet:
      class_path: diffusers.UNet2DModel
      init_args:
        sample_size: 32
        in_channels: 1
        out_channels: 1
        layers_per_block: 1
        block_out_channels: [8, 8]
        norm_num_groups: 4
        down_block_types: [DownBlock2D, DownBlock2D]
        up_block_types: [UpBlock2D, UpBlock2D]
        add_attention: false
    ema_decay: 0.9
data:
  class_path: FashionMNISTDataModule
  init_args:
    root: clothes
    subset: 240
    num_control: 64
    num_reference: 64
    batch_size: 24
    num_workers: 1
    flip: true
averaging:
  num_shards: 2
  every_n_epochs: 1
agc:
  threshold: 0.5
evaluation:
  num_samples: 64
  num_inference_steps: 2
  features: inception
trainer:
  accelerator: cpu
  max_epochs: 2
  enable_model_summary: false
"""


class SmallFeatures(nn.Module):
    """In the place of the Inception network, whose weights are no part of the tests."""

    num_features = 16

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


@pytest.mark.usefixtures("drawn")
def test_a_run_is_trained_and_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-iet"])
    monkeypatch.setattr(features, "InceptionFeatures", lambda weights, download: SmallFeatures())
    write_fashion(tmp_path / "clothes", train=300, test=128, packed=True)
    (tmp_path / "config.yaml").write_text(CONFIG)
    main(["fit", "--config", "config.yaml"])
    folder = tmp_path / "runs" / "run" / "version_0"
    report = json.loads((folder / "metrics.json").read_text())
    assert report["run"]["num_shards"] == 2
    with Image.open(folder / "samples.png") as image:
        assert min(image.size) > 100
    assert "FID" in capsys.readouterr().out
    assert torch.load(next(folder.rglob("*.ckpt")), weights_only=True)["epoch"] == 1
