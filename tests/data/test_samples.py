import os
import pickle

import numpy as np
import pytest
import torch
from PIL import UnidentifiedImageError
from torch.utils.data import Dataset, TensorDataset

from lightning_iet.data.samples import (
    RandomFlips,
    Samples,
    Skip,
    fingerprint_of_samples,
    fingerprint_of_shards,
    image_and_condition,
    labels_of,
    listed,
    name_of,
    reason_of,
)


class Words:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return "abc"[index], f"caption {index}", "more"


def test_some_samples_with_their_own_conditions():
    samples = Samples(Words(), torch.tensor([2, 0]), str.upper)
    assert [samples[0], samples[1]] == [("C", "caption 2", 0), ("A", "caption 0", 1)]
    assert len(samples) == 2
    assert labels_of(samples) is None


def test_labels_take_the_place_of_conditions():
    samples = Samples(Words(), torch.tensor([2, 0]), str.upper, labels=torch.tensor([4, 5, 6]))
    assert [samples[0], samples[1]] == [("C", 6, 0), ("A", 4, 1)]
    assert labels_of(samples).tolist() == [6, 4]


@pytest.mark.parametrize("sample", ["x", ("x",), ["x"], ("x", 0), ("x", 0, 7)])
def test_images_alone_have_condition_0(sample):
    assert image_and_condition(sample) == ("x", 0)


def test_flips_mirror_half_of_the_images_and_nothing_else():
    image = torch.arange(6.0).view(1, 2, 3)
    flips = RandomFlips(Samples([(image, 0)], torch.tensor([0]), lambda image: image, labels=torch.tensor([3])))
    drawn = [flips[0] for _ in range(400)]
    assert {(label, index) for _, label, index in drawn} == {(3, 0)}
    mirrored = sum(torch.equal(x, torch.tensor([[[2.0, 1, 0], [5, 4, 3]]])) for x, _, _ in drawn)
    assert sum(torch.equal(x, image) for x, _, _ in drawn) + mirrored == 400
    assert 150 < mirrored < 250
    assert labels_of(flips).tolist() == [3]


def test_flips_can_be_sent_to_workers():
    flips = pickle.loads(pickle.dumps(RandomFlips([(torch.zeros(1, 1, 1), 0, 0)])))
    assert len(flips) == 1
    assert labels_of(flips) is None


def test_samples_and_size_make_the_fingerprint():
    data = torch.rand(100, 3)
    same, changed, shorter = data.clone(), data.clone(), data[:99]
    changed[0, 0] += 1e-6
    prints = [fingerprint_of_samples(TensorDataset(images)) for images in (data, same, changed, shorter)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_random_augmentation_does_not_show():
    class Noisy(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"image": torch.full((2,), float(index)) + torch.rand(()), "caption": "text"}

    assert fingerprint_of_samples(Noisy()) == fingerprint_of_samples(Noisy())


@pytest.mark.parametrize("change", [[np.ones(3)], ["b"], [1.5], [b"x"]])
def test_samples_of_any_structure_differ(change):
    class Listed(Dataset):
        def __init__(self, sample):
            self.sample = sample

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return self.sample

    assert fingerprint_of_samples(Listed(change)) != fingerprint_of_samples(Listed([np.zeros(3)]))


def test_a_split_is_its_shards_and_their_order():
    a, b = torch.tensor([0, 1]), torch.tensor([2])
    assert fingerprint_of_shards([a, b]) == fingerprint_of_shards([a.clone(), b])
    assert fingerprint_of_shards([a, b]) != fingerprint_of_shards([b, a])
    assert fingerprint_of_shards([a, b]) != fingerprint_of_shards([torch.tensor([0]), torch.tensor([1, 2])])


class Opaque:
    """A sample whose text names its place in memory."""

    def __init__(self, value):
        self.value = value


def test_samples_of_any_kind_are_told_apart_by_what_they_hold():
    def make(value):
        number = torch.tensor(value)
        return [number[None], number.bfloat16(), {"a": Opaque(number)}, Opaque(value)]

    for one, same, other in zip(make(1.0), make(1.0), make(2.0), strict=True):
        assert fingerprint_of_samples([one]) == fingerprint_of_samples([same]) != fingerprint_of_samples([other])


def test_the_first_few_are_listed():
    skips = [Skip(f"{number}.png", "empty") for number in range(7)]
    assert listed(skips[:1]) == "'0.png' (empty)"
    assert listed(skips).endswith("'4.png' (empty), and 2 more")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("cut\n  off \x1b"), r"cut off \x1b"),
        (FileNotFoundError(2, os.strerror(2), "a.png"), "No such file or directory"),
        (
            UnidentifiedImageError("cannot identify image file <_io.BytesIO object at 0x7f>"),
            "not an image that Pillow knows",
        ),
        (MemoryError(), "MemoryError"),
    ],
)
def test_reasons_are_one_line(error, reason):
    assert reason_of(error) == reason


def test_samples_are_called_by_name_or_position():
    class Named(list):
        def name(self, index):
            return f"{index}\u202e.png"

    assert [name_of([1], 0), name_of(Named(), 7)] == ["0", r"7\u202e.png"]
