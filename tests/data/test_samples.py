import pickle

import pytest
import torch

from lightning_iet.data.samples import RandomFlips, Samples, image_and_condition, labels_of


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
