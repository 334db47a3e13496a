"""Closeness and counts against loops over pairs of images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from lightning_iet.data.duplicates import repeat_images
from lightning_iet.evaluation.memorization import RATIO, Closeness, below, measure_closeness
from lightning_iet.functional.duplicates import Duplicates, duplicate_groups


def random_images(count, seed):
    return torch.rand(count, 1, 4, 5, generator=torch.Generator().manual_seed(seed))


def naive_closeness(image, train, k):
    """Ratios and the nearest training image of one image."""
    distances = sorted((float((image - other).double().square().sum()), index) for index, other in enumerate(train))
    mean = sum(distance for distance, _ in distances[:k]) / k
    return (distances[0][0] / distances[1][0]) ** 0.5, distances[0][0] / mean, distances[0][1]


def test_closeness_equals_a_loop_over_pairs():
    images, train = random_images(7, 0), random_images(30, 1)
    found = measure_closeness(images, train, 6)
    for number, image in enumerate(images):
        ratio, mq_ratio, nearest = naive_closeness(image, train, 6)
        assert float(found.ratio[number]) == pytest.approx(ratio, rel=1e-4)
        assert float(found.mq_ratio[number]) == pytest.approx(mq_ratio, rel=1e-4)
        assert int(found.nearest[number]) == nearest


def test_of_two_versions_the_one_nearer_to_a_training_image_counts():
    train = random_images(30, 1)
    images = torch.cat([random_images(5, 0), 0.9 * train[3:5].flip(-1), 0.9 * train[8:9]])
    found = measure_closeness(images, train, 6, mirrored=True)
    for number, image in enumerate(images):
        versions = [image, image.flip(-1)]
        nearest = [min(float((version - other).square().sum()) for other in train) for version in versions]
        ratio, mq_ratio, index = naive_closeness(versions[nearest.index(min(nearest))], train, 6)
        assert float(found.ratio[number]) == pytest.approx(ratio, rel=1e-4)
        assert float(found.mq_ratio[number]) == pytest.approx(mq_ratio, rel=1e-4)
        assert int(found.nearest[number]) == index
    assert found.nearest[5:].tolist() == [3, 4, 8]
    assert measure_closeness(images, train, 6).nearest[5:].tolist() != [3, 4, 8]


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30), st.floats(0.1, 1))
def test_counts_are_those_of_a_loop(ratios, limit):
    closeness = Closeness(torch.tensor(ratios), torch.tensor(ratios).flip(0), torch.zeros(len(ratios)).long())
    counts = closeness.count(limit=limit, thresholds=(0.15, 0.3))
    limit32, low, high = (float(torch.tensor(value, dtype=torch.float32)) for value in (limit, 0.15, 0.3))
    assert counts.total == len(ratios)
    assert counts.memorized == sum(ratio < limit32 for ratio in ratios) == int(below(closeness.ratio, limit).sum())
    assert counts.quantity == {"0.15": sum(r < low for r in ratios), "0.3": sum(r < high for r in ratios)}
    assert counts.memorized_fraction == counts.memorized / len(ratios)
    assert counts.mq["0.3"] == counts.quantity["0.3"] / len(ratios)


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
