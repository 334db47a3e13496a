import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_iet.data.samples import fingerprint_of_samples, fingerprint_of_shards


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
