"""Closeness and counts against loops over pairs of images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.evaluation.memorization import Closeness, below, measure_closeness


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
