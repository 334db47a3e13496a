import pytest
import torch

from lightning_iet.data.images import IndexedImages


def test_eight_bits_are_read_as_floats():
    images = torch.arange(12, dtype=torch.uint8).view(3, 1, 2, 2)
    image, label, index = IndexedImages(images, torch.tensor([5, 6, 7]))[2]
    assert torch.equal(image, images[2] / 255)
    assert (int(label), index) == (7, 2)


def test_floats_stay_the_same_tensors():
    images = torch.rand(3, 1, 2, 2)
    assert IndexedImages(images, torch.zeros(3))[1][0].data_ptr() == images[1].data_ptr()


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"expected shape \(n, C, H, W\) with one label each, but got \(3, 1, 2, 2\)"):
        IndexedImages(torch.rand(3, 1, 2, 2), torch.zeros(2))
    for value in (float("nan"), 1.5, -0.1):
        with pytest.raises(ValueError, match=r"expected finite values in \[0, 1\]"):
            IndexedImages(torch.full((1, 1, 2, 2), value), torch.zeros(1))
    assert len(IndexedImages(torch.zeros(0, 1, 2, 2), torch.zeros(0))) == 0
