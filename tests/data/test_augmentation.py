"""Augmentation of single images: what it leaves alone, and what it depends on."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import RandAugment

from lightning_iet.data import Augmented, WithIndex
from lightning_iet.data.augmentation import Magnitudes, augment, find_layer, unaugmented
from lightning_iet.data.samples import RandomFlips
from lightning_iet.utilities.random import get_rng_state, isolated_rng, seed_rng


def image(channels=3, seed=0):
    return torch.rand(channels, 12, 10, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_equals_torchvision_on_eight_bits(seed):
    pixels = (image() * 255).round().to(torch.uint8)
    with isolated_rng():
        seed_rng(seed)
        expected = RandAugment(2, 7, num_magnitude_bins=31)(pixels)
    assert torch.equal(augment(pixels, 7, seed=seed), expected)
    assert torch.equal(augment(pixels / 255, 7, seed=seed), expected / 255)


def test_magnitude_zero_is_the_image_itself():
    picture = image()
    assert augment(picture, 0, seed=3) is picture


def test_depends_on_the_seed_alone_and_leaves_the_generators_alone():
    picture, before = image(), get_rng_state()
    found = [augment(picture, 30, seed=seed) for seed in (1, 2, 1)]
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert torch.equal(get_rng_state()["torch"], before["torch"])


def test_a_white_image_is_inverted_by_solarize_alone():
    white = torch.ones(1, 8, 8)
    names = ["Identity", "Rotate", "ShearX", "Brightness", "Contrast", "Sharpness", "Posterize", "Color"]
    without = [augment(white, 1, seed=seed, ops=names) for seed in range(60)]
    assert min(picture[:, 3:5, 3:5].min() for picture in without) > 0.5
    assert any((augment(white, 1, seed=seed, ops=["Solarize"]) == 0).all() for seed in range(3))
    assert any((augment(white, 1, seed=seed) == 0).all() for seed in range(60))  # all 14: as published


@pytest.mark.parametrize("channels", [2, 4])
def test_other_channels_take_operations_that_suit_them(channels):
    ops = ["Rotate", "TranslateX"]
    assert augment(image(channels), 10, seed=0, ops=ops).shape == (channels, 12, 10)
    with pytest.raises(
        ValueError, match=f"that suit images of {channels} channels, but got .*Use some of Identity, Sh"
    ):
        augment(image(channels), 10, seed=0)


def test_images_that_are_normalized_are_refused():
    with pytest.raises(
        ValueError, match=r"expected values in \[0, 1\], or 8 bits, .*, but got \[-0.99.*before they are no"
    ):
        augment(2 * image() - 1 - 1e-3, 3, seed=0)


@pytest.mark.parametrize("ops", [["Rotate", "Blur"], []])
def test_unknown_operations_are_refused(ops):
    with pytest.raises(ValueError, match=r"Argument `ops` expected some of Identity, ShearX.*, but got"):
        Magnitudes(ops=ops)


def samples(kind):
    images = [image(seed=seed) for seed in range(6)]
    if kind == "tensor":
        return images
    if kind == "dict":
        return [{"label": torch.tensor(3), "image": picture} for picture in images]
    return [(torch.tensor(7), picture, "a caption") for picture in images]


@pytest.mark.parametrize("kind", ["tensor", "dict", "tuple"])
def test_only_the_image_of_a_chosen_sample_changes(kind):
    plain, augmented = samples(kind), Augmented(samples(kind))
    augmented.magnitudes.write(torch.tensor([0, 30, 0, 30, 0, 0], dtype=torch.uint8), seed=1, epoch=2)

    def picture(sample):
        return sample if kind == "tensor" else sample["image"] if kind == "dict" else sample[1]

    for index in range(6):
        same = torch.equal(picture(augmented[index]), picture(plain[index]))
        assert same is (index not in (1, 3))
    if kind == "dict":
        assert augmented[1].keys() == plain[1].keys()
    if kind == "tuple":
        assert augmented[1][2] == "a caption"
    before = picture(augmented[1])
    augmented.magnitudes.write(augmented.magnitudes.by_sample, seed=1, epoch=3)
    assert not torch.equal(picture(augmented[1]), before)  # another epoch, another draw


def test_samples_without_an_image_are_refused():
    augmented = Augmented(TensorDataset(torch.rand(3, 5)))
    assert augmented[0][0].shape == (5,)
    augmented.magnitudes.write(torch.ones(3, dtype=torch.uint8), seed=0, epoch=0)
    with pytest.raises(ValueError, match=r"samples with an image, a tensor of shape \(C, H, W\), but got Tensor"):
        augmented[0]


def pictures(loader):
    return torch.cat([batch[0] for batch in loader])


def seeded(worker):
    """Every worker flips alike: its own generator is not what is tested here."""
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore:.*worker processes in total.*")
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_read_the_same_and_see_the_next_epoch(workers):
    augmented = Augmented(WithIndex(TensorDataset(torch.stack([image(seed=seed) for seed in range(12)]))))
    alone = DataLoader(augmented, batch_size=2)
    loader = DataLoader(augmented, batch_size=2, num_workers=workers, persistent_workers=True)
    for epoch in range(2):
        magnitudes = torch.randint(0, 31, (12,), generator=torch.Generator().manual_seed(epoch)).to(torch.uint8)
        augmented.magnitudes.write(magnitudes, seed=5, epoch=epoch)
        assert torch.equal(pictures(loader), pictures(alone))


def test_flips_are_those_without_it():
    """They draw from the same generator: what is flipped does not depend on what is augmented."""
    data = [(image(seed=seed), 0) for seed in range(20)]
    augmented = Augmented(data)
    augmented.magnitudes.write(torch.full((20,), 3, dtype=torch.uint8), seed=0, epoch=0)
    plain, flips = RandomFlips(data), RandomFlips(augmented)
    for index in range(20):
        for seed in range(3):
            seed_rng(seed)
            is_flipped = not torch.equal(plain[index][0], data[index][0])
            seed_rng(seed)
            expected = augmented[index][0].flip(-1) if is_flipped else augmented[index][0]
            seed_rng(seed)
            assert torch.equal(flips[index][0], expected)


def test_it_is_found_and_paused_and_pickled():
    augmented = Augmented(samples("tuple"))
    augmented.magnitudes.write(torch.full((6,), 30, dtype=torch.uint8), seed=0, epoch=0)
    loader = DataLoader(RandomFlips(augmented))

    class Module:
        def __init__(self):
            self.other, self.loader = 3, loader

    assert find_layer(Augmented, None, Module()) is augmented
    assert find_layer(Augmented, loader) is augmented
    assert find_layer(Augmented, DataLoader(samples("tuple")), object()) is None
    with unaugmented(loader.dataset):
        assert torch.equal(augmented[0][1], samples("tuple")[0][1])
    assert not torch.equal(augmented[0][1], samples("tuple")[0][1])
    copied = pickle.loads(pickle.dumps(augmented))
    assert torch.equal(copied[0][1], augmented[0][1])
