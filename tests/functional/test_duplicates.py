"""Groups of near-duplicates: planted ones of every size are found, and innocent images stay alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from lightning_iet.data.duplicates import repeat_images
from lightning_iet.functional.duplicates import distinct_ratio, duplicate_groups


@pytest.fixture(scope="module")
def digits():
    pixels, _ = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16


@pytest.mark.parametrize("repeats", [3, 30, 80, 200])
def test_near_duplicates_of_an_image_are_one_group_however_many_there_are(repeats, digits):
    alone = {tuple(group) for group in duplicate_groups(digits[:300]).members}
    images, source = repeat_images(digits[:300], repeated=1, repeats=repeats)
    groups = duplicate_groups(images)
    planted = (source == 0).nonzero().flatten().tolist()
    assert planted in groups.members
    assert {tuple(group) for group in groups.members if group != planted} == alone
    assert groups.largest == repeats


def test_several_large_groups_at_once(digits):
    images, source = repeat_images(digits[:200], repeated=4, repeats=70)
    groups = duplicate_groups(images)
    assert [(source == i).nonzero().flatten().tolist() for i in range(4)] == groups.members[:4]


@settings(max_examples=20)
@given(st.integers(4, 60), st.integers(0, 1000))
def test_where_no_image_is_crowded_pairs_are_those_of_the_mean_distance(number, seed):
    images = torch.rand(number, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    images[number // 2] = (images[0] + 0.01).clamp(max=1)
    distances = torch.cdist(images.flatten(1).double(), images.flatten(1).double()).tolist()
    k, alone = min(50, number - 1), set(range(number))
    for i, row in enumerate(distances):
        others = sorted(d**2 for j, d in enumerate(row) if j != i)[:k]
        alone -= {i for j, d in enumerate(row) if j != i and d**2 < sum(others) / k / 9}
        alone -= {j for j, d in enumerate(row) if j != i and d**2 < sum(others) / k / 9}
    assert sorted(set(range(number)) - alone) == sorted(i for group in duplicate_groups(images).members for i in group)


@given(st.integers(0, 10_000))
def test_the_distinct_ratio_agrees_with_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(3, (8,), generator=generator)
    group[:2] = torch.tensor([0, 1])
    distances = torch.rand(4, 8, generator=generator) + 1e-3
    order = distances.argsort(dim=1)
    found = distinct_ratio(distances.gather(1, order), order, group).tolist()
    for row, ratio in zip(distances.tolist(), found, strict=True):
        nearest = min(range(8), key=row.__getitem__)
        second = min(d for d, g in zip(row, group.tolist(), strict=True) if g != group[nearest])
        assert ratio == pytest.approx((row[nearest] / second) ** 0.5)


@pytest.mark.parametrize(
    ("options", "argument"), [({"k": 0}, "k"), ({"ratio": 0.0}, "ratio"), ({"ratio": 2.0}, "ratio")]
)
def test_settings_out_of_range_are_refused(options, argument):
    with pytest.raises(ValueError, match=f"Argument `{argument}` expected"):
        duplicate_groups(torch.rand(5, 1, 4, 4), **options)
