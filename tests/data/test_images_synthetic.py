import torch

from lightning_iet.data.images import SyntheticImages
from lightning_iet.data.samples import labels_of


def test_images_are_random_and_always_the_same():
    images = SyntheticImages(4, channels=3, size=(6, 4), num_classes=2)
    assert torch.equal(images[1][0], images[1][0])
    assert not torch.equal(images[1][0], images[2][0])
    assert not torch.equal(images[1][0], SyntheticImages(4, channels=3, size=(6, 4), seed=1)[1][0])
    assert images[0][0].shape == (3, 6, 4)
    assert labels_of(images).tolist() == [0, 1, 0, 1]


def test_conditions_are_labels_captions_or_nothing():
    assert labels_of(SyntheticImages(4, channels=1, size=(2, 2))) is None
    captioned = SyntheticImages(4, channels=1, size=(2, 2), num_classes=2, captioned=True)
    assert labels_of(captioned) is None
    assert len({captioned[number][1] for number in range(4)}) == 4
