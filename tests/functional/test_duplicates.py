"""Groups of near-duplicates: planted ones of every size are found, and innocent images stay alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from lightning_iet.data.duplicates import repeat_images
from lightning_iet.functional import duplicates
from lightning_iet.functional.duplicates import duplicate_groups, nearest_of_two_groups
from lightning_iet.functional.memorization import distinct_ratio


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


def planted(*sizes, singles=120, seed=0, dimension=48, noise=0.02):
    """Random images; of the first some, one each, there are near-duplicates. Shuffled; the label of each original."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(singles, dimension, generator=generator)
    originals = torch.cat([torch.arange(singles), torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes) - 1)])
    noised = rows[originals] + noise * torch.randn(len(originals), dimension, generator=generator)
    order = torch.randperm(len(originals), generator=generator)
    return noised.clamp(0, 1)[order], originals[order]


def partition(labels):
    groups = {}
    for index, label in enumerate(labels):
        groups.setdefault(int(label), set()).add(index)
    return sorted(map(sorted, groups.values()))


@pytest.mark.parametrize("sizes", [(3,), (30,), (80,), (200,), (3, 30, 80, 200), (2, 2)])
def test_planted_near_duplicates_are_found_and_only_those(sizes):
    rows, originals = planted(*sizes)
    assert partition(duplicate_groups(rows).group) == partition(originals)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_the_second_nearest_is_of_another_group(seed):
    rows, originals = planted(20, 5, singles=30, seed=seed)
    queries = rows[::3] * 0.95
    distances, indices = nearest_of_two_groups(queries, rows, originals)
    exact = torch.cdist(queries.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    for query, (first, second) in enumerate(indices.tolist()):
        assert first == exact[query].argmin()
        others = exact[query].masked_fill(originals == originals[first], torch.inf)
        assert second == others.argmin()
        torch.testing.assert_close(distances[query].double(), exact[query, [first, second]], rtol=1e-4, atol=0)


def test_neighbours_at_hand_are_used_and_only_open_ones_are_searched_again(monkeypatch):
    rows, originals = planted(40, singles=30)
    expected = nearest_of_two_groups(rows, rows, originals)
    searched = []
    search = duplicates.search_rows

    def counted(queries, *args, **kwargs):
        searched.append(len(queries))
        return search(queries, *args, **kwargs)

    found = search(rows, rows, 10)
    monkeypatch.setattr(duplicates, "search_rows", counted)
    again = nearest_of_two_groups(rows, rows, originals, found=found)
    assert all(map(torch.equal, again, expected))
    assert searched == [40]


def test_a_set_of_one_group_is_refused():
    with pytest.raises(ValueError, match=r"at least two groups, but all 5 are near-duplicates .*duplicates='keep'"):
        nearest_of_two_groups(torch.rand(2, 4), torch.ones(5, 4), torch.zeros(5, dtype=torch.int64))
