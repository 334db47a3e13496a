from itertools import count

import pytest
import torch

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.features import BATCH, Features, _key, _Rows, build_features, estimated_seconds, extract
from tests.helpers.image_folders import random_set


class Counting(torch.nn.Module):
    """Remembers how many images went through it at once."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(len(images))
        return images.flatten(1).float()


@pytest.mark.parametrize(
    ("name", "size", "most"),
    [("efficientnet", 8, 5), ("sscd", 8, 4), ("clip", 8, 5), ("own.ts", 8, 256), ("x", 256, 4)],
)
def test_few_large_images_go_through_a_network_at_once_on_a_cpu(name, size, most):
    network, images = Counting(), torch.randint(256, (300, 1, size, size), dtype=torch.uint8)
    rows = _Rows(name, network, "cpu")(images)
    assert (sum(network.seen), max(network.seen)) == (300, most)
    expected = images.flatten(1).float()
    if name in ("sscd", "clip"):
        expected = torch.nn.functional.normalize(expected)
    assert torch.equal(rows, expected)


def test_all_large_images_go_through_it_at_once_on_a_gpu():
    network = _Rows("efficientnet", Counting(), "cuda")
    assert network._batch(torch.zeros(300, 1, 8, 8)) == BATCH


def test_an_image_has_the_same_features_whatever_is_beside_it():
    """So that a copy is at distance zero."""
    torch.set_num_threads(1)  # on more, oneDNN may cut a batch in another way than one image
    images = random_set(13, size=28).pixels
    rows = build_features("efficientnet").rows
    assert torch.equal(rows(images), torch.cat([rows(image[None]) for image in images]))


def test_the_time_of_features_is_that_of_a_few_times_all(tmp_path, monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr("lightning_iet.audit.features.perf_counter", lambda: next(clock))
    seen = []
    network = Features("net", "1", lambda images: seen.append(len(images)) or images.flatten(1).float())
    sets = {"train": random_set(290), "generated": random_set(10, seed=1), "held_out": random_set(5, seed=2)}
    cache = BlockCache(tmp_path)
    assert estimated_seconds(sets, network, cache, versions=1) == 0  # it is not worth the trial
    assert estimated_seconds(sets, network, cache, versions=2) == 2.0 / 16 * (290 + 2 * 15)
    assert seen == [1, 16]
    extract(sets["train"], network, cache, argument="train")
    assert estimated_seconds(sets, network, cache, versions=2) == 0  # few are left
    assert estimated_seconds(sets, build_features("pixels"), cache, versions=2) == 0


def test_only_images_whose_blocks_are_missing_count(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_iet.audit.features.TRIED", 2)
    ticks = count()
    monkeypatch.setattr("lightning_iet.audit.features.perf_counter", lambda: float(next(ticks)))
    network = Features("net", "1", lambda images: images.flatten(1).float())
    sets = {"train": random_set(300), "generated": random_set(60, seed=1)}
    cache = BlockCache(tmp_path)
    assert estimated_seconds(sets, network, cache, versions=3) == (300 + 3 * 60) / 2
    extract(sets["train"], network, cache, argument="train")
    assert estimated_seconds(sets, network, cache, versions=3) == 3 * 60 / 2
    extract(sets["generated"], network, cache, argument="generated")
    assert estimated_seconds(sets, network, cache, versions=3) == 2 * 60 / 2
    assert estimated_seconds(sets, network, cache, versions=1) == 0
    cache._path(_key(sets["train"], network, 0)).unlink()
    assert estimated_seconds(sets, network, cache, versions=1) == 256 / 2


def test_the_clock_runs_until_a_result_is_on_the_cpu(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lightning_iet.audit.features.perf_counter", lambda: now[0])

    class OnGPU:
        def __init__(self, images):
            self.images = images

        def cpu(self):
            now[0] += len(self.images)

    network = Features("net", "1", OnGPU, "cuda")
    sets = {"train": random_set(320)}
    assert estimated_seconds(sets, network, BlockCache(tmp_path), versions=1) == 320
