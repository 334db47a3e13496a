"""Closeness of images to training images, with near-duplicates counted once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from lightning_iet.data.duplicates import repeat_images
from lightning_iet.evaluation.memorization import RATIO, measure_closeness
from lightning_iet.functional.duplicates import Duplicates, duplicate_groups


@pytest.fixture(scope="module")
def digits():
    pixels, _ = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16


def near(images, seed=1):
    """Images hardly different from these: copies."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + 0.01 * noise).clamp(0, 1)


@pytest.mark.parametrize("repeats", [1, 3, 30, 80, 200])
def test_copies_of_an_image_are_found_however_often_it_occurs(repeats, digits):
    train, _ = repeat_images(digits[:300], repeated=1, repeats=repeats)
    copies, others = near(digits[:1].repeat(15, 1, 1, 1)), digits[1000:1030]
    found = measure_closeness(torch.cat([copies, others]), train, 50, duplicates=duplicate_groups(train))
    published = measure_closeness(torch.cat([copies, others]), train, 50)
    shares = found.copied_fractions()
    held_out = int((published.ratio[15:] < RATIO).sum())
    kind = "copied_fraction_of_others" if repeats == 1 else "copied_fraction_of_repeated"
    assert shares[kind] * 45 >= 15 - 1e-9
    assert shares["copied_fraction"] * 45 <= 15 + held_out + 1e-9
    if repeats > 1:
        assert int((published.ratio[:15] < RATIO).sum()) <= 5  # what the published ratio sees of them


@given(st.integers(0, 1000))
def test_the_distinct_ratio_agrees_with_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    train, images = torch.rand(12, 1, 2, 2, generator=generator), torch.rand(5, 1, 2, 2, generator=generator)
    group = torch.randint(3, (12,), generator=generator)
    group[:3] = torch.arange(3)
    members = [m for g in range(3) if len(m := (group == g).nonzero().flatten().tolist()) > 1]
    found = measure_closeness(images, train, 4, duplicates=Duplicates(group, sorted(members, key=len, reverse=True)))
    for i, image in enumerate(images):
        distances = [float((image - other).norm()) for other in train]
        nearest = min(range(12), key=distances.__getitem__)
        second = min(d for d, g in zip(distances, group.tolist(), strict=True) if g != group[nearest])
        assert float(found.distinct_ratio[i]) == pytest.approx(distances[nearest] / second, rel=1e-3)
        assert bool(found.of_repeated[i]) == (int((group == group[nearest]).sum()) > 1)


def test_without_near_duplicates_it_is_the_published_measure(digits):
    train, images = digits[:50], near(digits[40:60])
    found = measure_closeness(images, train, 10, duplicates=Duplicates(torch.arange(50), []))
    assert found.copied_fractions()["copied_fraction"] == found.count().memorized_fraction
    assert found.copied_fractions()["copied_fraction_of_repeated"] == 0
