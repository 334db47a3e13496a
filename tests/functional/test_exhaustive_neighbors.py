import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from lightning_iet.functional import exhaustive_neighbors
from lightning_iet.functional.exhaustive_neighbors import (
    _PAIR_ERROR,
    ExhaustiveSearch,
    _multiplies_exactly,
    _partial_distances,
    _smallest,
    _usual_rounding,
    float_rows,
    has_integer_products,
    level_distances,
    level_moments,
    merge_nearest,
    pair_distances,
    rounding,
    sort_neighbors,
    squared_norms,
)
from tests.helpers.neighbors import FAMILIES, assert_found, family


@pytest.mark.parametrize("dimension", [3072, 49152])
def test_norms_of_one_colour_are_correctly_rounded(dimension):
    rows = torch.rand(20, 1).expand(-1, dimension).contiguous()
    assert torch.equal(squared_norms(rows), rows.double().square().sum(dim=1).float())


@pytest.mark.parametrize("bound", [rounding, _usual_rounding])
@given(kind=st.sampled_from(FAMILIES), dimension=st.sampled_from([1, 48, 192, 3072, 5000]), seed=st.integers(0, 999))
def test_estimates_are_within_their_bounds(bound, kind, dimension, seed):
    rows = family(kind, 30, dimension, seed=seed)
    norms = squared_norms(rows)
    estimates = (_partial_distances(rows, rows, norms, out=torch.empty(30, 30)) + norms[:, None]).double()
    lengths = norms.double().sqrt() + norms.double().sqrt()[:, None]
    distances = torch.stack([(row.double() - rows.double()).square().sum(dim=1) for row in rows])
    assert ((estimates - distances).abs() <= bound(lengths, dimension) + 1e-30).all()


@given(
    columns=st.integers(1, 300),
    number=st.integers(1, 9),
    levels=st.sampled_from([2, 30, 10**6]),
    seed=st.integers(0, 999),
)
def test_the_smallest_values_of_rows(columns, number, levels, seed):
    """With many equal values, which may be left out but for their number, and without."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-levels, levels, (4, columns), generator=generator).float()
    found, places = _smallest(values, min(number, columns))
    assert torch.equal(found, values.sort(dim=1).values[:, :number])
    assert torch.equal(values.gather(1, places), found)
    assert all(len(set(row)) == len(row) for row in places.tolist())


@given(kind=st.sampled_from(FAMILIES), ties=st.booleans(), seed=st.integers(0, 999), k=st.integers(1, 60))
def test_no_neighbour_is_lost(kind, ties, seed, k):
    queries, references = family(kind, 5, 192, seed=seed), family(kind, 60, 192, seed=seed + 1)
    search = ExhaustiveSearch(references, squared_norms(references), k, ties, chunk_size=25)
    assert_found(queries, references, *search.nearest(queries), ties=ties)


def test_half_precision_and_float64_are_searched_in_float32_and_measured_in_their_own():
    references = torch.rand(50, 48, dtype=torch.float64)
    queries = references[:3] + 1e-9  # nothing is left of that in float32
    search = ExhaustiveSearch(references, squared_norms(references), 1)
    distances, indices = search.nearest(queries)
    torch.testing.assert_close(distances, torch.full((3, 1), 48e-18), rtol=1e-4, atol=0)
    assert indices.flatten().tolist() == [0, 1, 2]
    half = references.half()
    assert_found(half[:3], half, *ExhaustiveSearch(half, squared_norms(half), 5).nearest(half[:3]))


def test_float_rows_copies_only_what_has_another_type():
    rows = torch.rand(3, 4)
    assert float_rows(rows) is rows


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
    torch.testing.assert_close(pair_distances(queries, dark, i, 0 * i), expected, rtol=_PAIR_ERROR, atol=0)


@pytest.fixture(params=["integers", "floats"])
def products(request, monkeypatch):
    """Both ways to multiply levels, where this processor has both."""
    if request.param == "integers" and not has_integer_products():
        pytest.skip("needs instructions for products of 8-bit integers")
    monkeypatch.setattr(exhaustive_neighbors, "has_integer_products", lambda: request.param == "integers")


@pytest.mark.parametrize("dimension", [1, 7, 64, 1025, 2**14 + 1, 40_000])
@pytest.mark.parametrize("numbers", [(1, 5), (3, 1), (3, 5), (2, 300)])
@pytest.mark.parametrize("extreme", [False, True])
def test_distances_of_levels_are_exact(products, dimension, numbers, extreme):
    queries, references = (images(n, dimension, torch.uint8) for n in numbers)
    if extreme:  # the largest sums of products there are
        queries, references = (255 * (rows > 127).byte() for rows in (queries, references))
        queries[0], references[0] = 0, 255
    expected = (queries.long()[:, None] - references.long()).square().sum(dim=2).double() / 255**2
    assert torch.equal(level_distances(queries, references), expected)
    at_hand = level_moments(queries)[1], level_moments(references)[1]
    assert torch.equal(level_distances(queries, references, at_hand), expected)


@pytest.mark.parametrize("shape", [(3, 1), (2, 3, 1024), (2, 5000), (5, 2048), (1, 2**19 + 3), (0, 3, 9), (2, 0)])
@pytest.mark.parametrize("extreme", [False, True])
def test_sums_of_levels_are_those_of_integers(shape, extreme):
    levels = torch.randint(256, shape, dtype=torch.uint8)
    levels[..., :1] = 0
    if extreme:  # the largest sums that there are
        levels.zero_()
    column_major = levels.mT.contiguous().mT
    for either in (levels, column_major):
        for power, found in enumerate(level_moments(either), 1):
            assert torch.equal(found, ((levels.long() - 128) ** power).sum(dim=-1).double())


def test_integers_are_multiplied_only_where_it_is_fast_and_exact(monkeypatch):
    def saturating(x, y):  # as oneDNN on processors that add pairs of products in 16 bits
        pairs = (x.int()[:, None] * y.T.int()).unflatten(2, (-1, 2)).sum(dim=3)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(dim=2, dtype=torch.int32)

    def exact(x, y):
        return x.int() @ y.int()

    def unsupported(x, y):
        raise RuntimeError("not implemented for this CPU")

    def answer(*, product=exact, capability="AVX512", available=True, enabled=True):
        monkeypatch.setattr(exhaustive_neighbors, "_multiplies_exactly", _multiplies_exactly.__wrapped__)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)
        monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: enabled)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch, "_int_mm", product)
        return has_integer_products()

    assert answer() is True
    assert answer(product=saturating) is False
    assert answer(product=unsupported) is False
    assert answer(capability="DEFAULT") is False
    assert answer(available=False) is False
    assert answer(enabled=False) is False


def test_tensors_without_values_do_not_settle_how_integers_are_multiplied():
    expected = has_integer_products()
    _multiplies_exactly.cache_clear()
    with FakeTensorMode():
        assert has_integer_products() is False
    assert has_integer_products() is expected


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
