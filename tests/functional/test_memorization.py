import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional.memorization import (
    MQ_THRESHOLDS,
    count_below,
    memorization_ratio,
    memorized_fraction,
    memorized_quantity,
    nearest_ratio,
)


def distance(a, b):
    """Plain l2 distance of two images in [0, 1], pixel by pixel."""
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)))


def naive_quantity(generated, train, thresholds, k):
    ratios = []
    for image in generated:
        squared = sorted(distance(image, other) ** 2 for other in train)[:k]
        ratios.append(squared[0] / (sum(squared) / k) if sum(squared) else 0.0)
    return {f"mq_{threshold:g}": sum(ratio < threshold for ratio in ratios) / len(ratios) for threshold in thresholds}


def naive_fraction(generated, train, ratio):
    found = 0
    for image in generated:
        first, second = sorted(distance(image, other) for other in train)[:2]
        found += first < ratio * second or second == 0
    return found / len(generated)


def draw(seed, num_train=30, num_generated=12, shape=(1, 3, 3)):
    """Random images; some generated ones lie on the way from a training image to a random one."""
    generator = torch.Generator().manual_seed(seed)
    train = torch.rand(num_train, *shape, generator=generator)
    generated = torch.rand(num_generated, *shape, generator=generator)
    way = torch.rand(num_generated // 2, 1, 1, 1, generator=generator)
    generated[: num_generated // 2].lerp_(train[: num_generated // 2], way)
    return generated, train


@given(seed=st.integers(0, 10_000), k=st.integers(2, 30))
def test_quantity_equals_the_double_loop(seed, k):
    generated, train = draw(seed)
    expected = naive_quantity(generated, train, MQ_THRESHOLDS, k)
    assert memorized_quantity(generated, train, k=k) == expected


@given(seed=st.integers(0, 10_000), ratio=st.sampled_from([0.1, 1 / 3, 0.5, 0.9]))
def test_fraction_equals_the_double_loop(seed, ratio):
    generated, train = draw(seed)
    expected = naive_fraction(generated, train, ratio)
    assert memorized_fraction(generated, train, ratio=ratio).item() == pytest.approx(expected)


def test_planted_copies_are_found_and_only_those():
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(256, (80, 3, 8, 8), dtype=torch.uint8, generator=generator)
    generated = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    generated[:7] = train[20:27]
    generated[7, 0, 0, 0] += 1  # still no copy
    generated[:7, 0, 0, 0] ^= 1  # copies but for one level of one pixel
    assert memorized_quantity(generated, train) == naive_quantity(generated / 255, train / 255, MQ_THRESHOLDS, 50)
    assert memorized_quantity(generated, train)["mq_0.15"] == 7 / 40
    assert memorized_fraction(generated, train) == 7 / 40


def test_near_duplicates_of_the_original_may_count_as_one_image():
    draw = torch.Generator().manual_seed(0)
    train, others = torch.rand(2, 60, 1, 4, 4, generator=draw)
    train[:20] = (train[0] + 0.01 * torch.rand(20, 1, 4, 4, generator=draw)).clamp(0, 1)
    generated = torch.cat([train[:1] * 0.98, others])
    one_each = torch.cat([train[19:20], train[20:]])
    assert memorized_fraction(generated, train) == 0
    assert memorized_fraction(generated, train, duplicates="group") == naive_fraction(generated, one_each, 1 / 3) > 0


@pytest.mark.parametrize("times", [2, 3, 60])
def test_an_exact_copy_of_a_duplicated_training_image_counts(times):
    train = torch.rand(70, 1, 4, 4)
    train[:times] = train[0].clone()
    copies, others = train[:1].repeat(3, 1, 1, 1), torch.rand(5, 1, 4, 4)
    generated = torch.cat([copies, others])
    assert memorized_quantity(generated, train)["mq_0.15"] == 3 / 8
    assert memorized_fraction(generated, train) == naive_fraction(generated, train, 1 / 3) >= 3 / 8


def test_ratio_at_the_threshold_does_not_count():
    train = torch.tensor([0.25, 0.875]).reshape(2, 1, 1, 1)
    generated = torch.tensor([0.375]).reshape(1, 1, 1, 1)  # d1 / d2 = 0.125 / 0.5
    assert memorized_fraction(generated, train, ratio=0.25) == 0
    assert memorized_fraction(generated, train, ratio=0.2501) == 1
    assert memorized_quantity(generated, train, thresholds=(2 / 17, 0.118), k=2) == {"mq_0.117647": 0, "mq_0.118": 1}


@given(
    rows=st.lists(
        st.lists(st.floats(0, 100, width=32, allow_subnormal=False), min_size=4, max_size=4), min_size=1, max_size=5
    )
)
def test_ratios_lie_between_0_and_1(rows):
    sq_distances = torch.tensor(rows).sort(dim=1).values
    for ratios in (memorization_ratio(sq_distances), nearest_ratio(sq_distances)):
        assert ratios.shape == (len(rows),)
        assert ((ratios >= 0) & (ratios <= 1 + 1e-6)).all()


def test_memorization_ratio_ignores_the_order():
    sq_distances = torch.rand(5, 50)
    torch.testing.assert_close(memorization_ratio(sq_distances.flip(1)), memorization_ratio(sq_distances))


def test_counts_are_integers_and_empty_input_counts_nothing():
    assert torch.equal(count_below(torch.zeros(0), (0.1, 0.2)), torch.tensor([0, 0]))
    nothing, train = torch.zeros(0, 1, 2, 2), torch.rand(60, 1, 2, 2)
    assert len(memorized_quantity(nothing, train)) == len(MQ_THRESHOLDS)
    assert all(share.isnan() for share in memorized_quantity(nothing, train).values())
    assert memorized_fraction(nothing, train).isnan()
