import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional.exhaustive_neighbors import RELATIVE_ERROR, merge_nearest, pair_distances, sort_neighbors


def squared_distance(x, y):
    """In float64; a uint8 image of levels is exact."""
    x, y = (image.double() / 255 if image.dtype == torch.uint8 else image.double() for image in (x, y))
    return ((x - y) ** 2).sum().item()


def images(n, dimension, dtype):
    levels = torch.randint(256, (n, dimension), dtype=torch.uint8)
    return levels if dtype == torch.uint8 else torch.rand(n, dimension, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("dimension", [1, 7, 1031, 3072])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_pairs_equal_the_sum_of_squared_differences(dtype, dimension, precise):
    queries, references = images(5, dimension, dtype), images(9, dimension, dtype)
    i, j = torch.tensor([0, 0, 0, 2, 4, 4]), torch.tensor([3, 8, 8, 0, 1, 2])
    expected = [squared_distance(queries[a], references[b]) for a, b in zip(i.tolist(), j.tolist(), strict=True)]
    found = pair_distances(queries, references, i, j, precise=precise)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12 if precise else 2e-6, atol=0
    )


def test_uint8_and_float_images_of_the_same_levels_are_at_distance_zero():
    levels = images(3, 3072, torch.uint8)
    pairs = torch.arange(3), torch.arange(3)
    assert torch.equal(pair_distances(levels, levels.float() / 255, *pairs), torch.zeros(3).double())


@pytest.mark.parametrize("dimension", [3072, 12288, 196608])
def test_a_change_of_brightness_is_measured_right(dimension):
    """All differences are equal, so all roundings go the same way."""
    dark = torch.full((1, dimension), 0.3)
    queries = dark + torch.linspace(0.01, 0.7, 40)[:, None]
    i = torch.arange(40)
    expected = torch.tensor([squared_distance(query, dark[0]) for query in queries], dtype=torch.float64)
    torch.testing.assert_close(pair_distances(queries, dark, i, 0 * i), expected, rtol=RELATIVE_ERROR, atol=0)


def test_no_pairs_give_no_distances():
    none = torch.zeros(0, dtype=torch.int64)
    assert pair_distances(torch.zeros(0, 4), torch.zeros(3, 4), none, none).shape == (0,)


def test_near_ties_are_told_apart_and_ties_come_by_index():
    references = torch.zeros(4, 3072)
    references[0] = 0.5
    references[1] = 0.5
    references[2, :] = 0.5
    references[2, 7] = 0.5 - 1e-3  # nearer by one part in 150,000
    query = torch.zeros(1, 3072)
    rough = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).double() * 3072 / 4
    found = sort_neighbors(query, references, rough, torch.tensor([[1, 2, 0, 3]]), 4)
    assert found[1].tolist() == [[3, 2, 0, 1]]


def naive_merge(lists, k):
    nearest = sorted({pair for found in lists for pair in zip(*found, strict=True)})
    return nearest[:k] + [(float("inf"), -1)] * (k - len(nearest))


@given(
    distances=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    held=st.lists(st.lists(st.integers(0, 11), max_size=8, unique=True), min_size=3, max_size=3),
    k=st.integers(1, 8),
)
def test_merging_is_naive_merging_and_associative(distances, held, k):
    """Three processes hold some of twelve references, some of them twice."""
    lists = [([distances[index] for index in indices], indices) for indices in held]
    a, b, c = ((torch.tensor([d]).float(), torch.tensor([i]).long()) for d, i in lists)
    merged = merge_nearest(a, b, c, k=k)
    assert list(zip(merged[0][0].tolist(), merged[1][0].tolist(), strict=True)) == naive_merge(lists, k)
    for other in (
        merge_nearest(merge_nearest(a, b, k=k), c, k=k),
        merge_nearest(a, merge_nearest(c, b, k=k), k=k),
    ):
        assert all(map(torch.equal, other, merged))
