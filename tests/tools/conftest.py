"""Fixtures of the tools' tests."""

import pytest
import torch

from tests.helpers.audits import DATE
from tests.helpers.image_folders import random_pixels, write_images


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Folders of training, generated (3 copies among 40) and held-out images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", DATE)
    train = random_pixels(60)
    write_images(tmp_path / "train", train)
    write_images(tmp_path / "generated", torch.cat([train[:3], random_pixels(37, seed=1)]))
    write_images(tmp_path / "held_out", random_pixels(30, seed=2))
    return tmp_path
