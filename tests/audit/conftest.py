"""An audit with what a report must cope with: copies, duplicates, names that would be markup."""

from dataclasses import replace

import pytest
import torch

from lightning_iet.audit import Settings, audit_images, image_set
from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.features import build_features
from lightning_iet.data.samples import Skip
from lightning_iet.evaluation.membership import infer_membership
from tests.helpers.image_folders import NASTY, random_pixels


def _sets():
    train = image_set(random_pixels(80, channels=3), location="train")
    train.pixels[40] = train.pixels[3]
    faded = (train.pixels[10:20].float() * torch.linspace(0.5, 0.99, 10).view(-1, 1, 1, 1)).to(torch.uint8)
    pixels = torch.cat([train.pixels[[3, 5, 5, 7]], faded, random_pixels(60, seed=1, channels=3)])
    generated = image_set(pixels, location=f"generated/{NASTY}")
    names = [NASTY, *(f"{number}.png" for number in range(1, len(pixels)))]
    generated = replace(generated, names=names, skipped=[Skip(f"broken {NASTY}", "the file is empty")])
    held_out = image_set(random_pixels(50, seed=2, channels=3), location="held-out")
    return generated, train, held_out


@pytest.fixture(scope="session")
def membership():
    losses = torch.rand(60, 4, generator=torch.Generator().manual_seed(0)).split(30)
    return infer_membership(losses[0] * 0.7, losses[1], torch.tensor([125, 375, 625, 875]))


@pytest.fixture(scope="session")
def small_audit(tmp_path_factory):
    cache = BlockCache(tmp_path_factory.mktemp("cache"))
    return audit_images(*_sets(), features=build_features("pixels"), cache=cache, settings=Settings(k=20))


@pytest.fixture(scope="session", params=[1, 10], ids=["small", "large"])
def audited(request, small_audit):
    """An audit of images of 8 pixels; its pictures are of 8 or 80.

    Those are too small to be degraded; ``test_report.py`` has an audit of larger ones.
    """

    def enlarged(images):
        times = request.param
        return replace(images, pixels=images.pixels.repeat_interleave(times, -2).repeat_interleave(times, -1))

    return replace(small_audit, sets={name: enlarged(images) for name, images in small_audit.sets.items()})
