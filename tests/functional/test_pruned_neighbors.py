import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional import neighbors, pruned_neighbors
from lightning_iet.functional import neighbors as neighbor_plan
from lightning_iet.functional.exhaustive_neighbors import (
    INTEGERS_MOST,
    ExhaustiveSearch,
    has_integer_products,
    integer_products,
    squared_norms,
)
from lightning_iet.functional.neighbors import plan_projection, search_rows
from lightning_iet.functional.pruned_neighbors import (
    Levels,
    Projection,
    PrunedSearch,
    pair_bounds,
    principal_directions,
)
from tests.helpers.neighbors import FAMILIES, assert_found, family


def basis(dimension, length, *, seed):
    start = torch.randn(dimension, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(start).Q


@given(kind=st.sampled_from(FAMILIES), length=st.integers(1, 48), seed=st.integers(0, 999), mean=st.floats(0, 1))
def test_codes_are_no_farther_apart_than_images(kind, length, seed, mean):
    rows = family(kind, 30, 192, seed=seed)
    codes = Projection(torch.full((192,), mean).double(), basis(192, length, seed=seed)).codes(rows)
    apart = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    coded = torch.cdist(codes.z.double(), codes.z.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert (coded <= apart + codes.slack + codes.slack[:, None]).all()


@given(
    kind=st.sampled_from(FAMILIES),
    seed=st.integers(0, 999),
    low=st.floats(-1e4, 1e4),
    width=st.floats(1e-3, 1e4),
    part=st.sampled_from([1, 2, 30]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_levels_are_no_farther_apart_than_rows(kind, seed, low, width, part, dtype):
    """Also of rows that lie beyond what the levels were made for, and far from zero."""
    rows = low + width * family(kind, 30, 192, seed=seed).to(dtype)
    levels = Levels.of(rows[:part])
    codes = levels.codes(rows)
    assert codes.z.dtype == torch.int8
    z = codes.z.double() / levels.per_unit
    torch.testing.assert_close(codes.norms, z.square().sum(dim=1), rtol=1e-12, atol=1e-12)
    apart = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    coded = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    assert (coded <= apart + codes.slack + codes.slack[:, None]).all()


def test_levels_of_8_bit_images_are_their_own():
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 2)
    levels = Levels.of(images / 255)
    for rows in (images, images / 255, images.double() / 255):
        codes = levels.codes(rows)
        assert torch.equal(codes.z.short() + 128, images.short())
        assert codes.slack.max() < 5e-5 / 255 * 512**0.5
    assert Levels.of(torch.zeros(2, 3)).codes(torch.zeros(2, 3)).slack.max() < 1e-20  # all of one value


@given(kind=st.sampled_from(FAMILIES), seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_distances_are_within_the_bounds_of_pairs(kind, seed, dtype):
    queries, references = family(kind, 5, 3072, seed=seed).to(dtype), family(kind, 30, 3072, seed=seed + 1).to(dtype)
    i, j = torch.arange(5).repeat_interleave(30), torch.arange(30).repeat(5)
    lower, upper = pair_bounds(queries, references, squared_norms(references), i, j)
    distances = (queries[i].double() - references[j].double()).square().sum(dim=1)
    assert (lower <= distances + 1e-36).all()
    assert (upper >= distances - 1e-36).all()


@given(kind=st.sampled_from(FAMILIES), length=st.sampled_from([1, 5, 64]), seed=st.integers(0, 999), data=st.data())
def test_any_basis_finds_the_neighbours(kind, length, seed, data):
    """A bad basis rules out nothing, or nearly; a good one must not rule out too much."""
    queries, references = family(kind, 7, 192, seed=seed), family(kind, 90, 192, seed=seed + 1)
    k = data.draw(st.integers(1, 90))
    exhaustive = ExhaustiveSearch(references, squared_norms(references), k)
    for projection in (
        Projection(references.double().mean(dim=0), basis(192, length, seed=seed)),
        principal_directions(references, length),
        Levels.of(references[:length]),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pruned_neighbors, "integer_products", lambda x, y: (x.double() @ y.double()).int())
            cost = data.draw(st.sampled_from([0, 40]))
            patch.setattr(pruned_neighbors, "candidate_cost", lambda *_, cost=cost: cost)
            patch.setattr(pruned_neighbors, "SPARE", 0)
            patch.setattr(pruned_neighbors, "_PRODUCT", 32)
            *found, easy = PrunedSearch(exhaustive, projection).nearest(queries, torch.full((7,), torch.inf))
            if cost == 0:
                assert easy.all()
        if easy.any():
            assert_found(queries[easy], references, *(part[easy] for part in found))


def low_rank(n, *, seed):
    """Images near a subspace of ten dimensions, as photographs are near one of a few hundred."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, 10, generator=generator) / 10
    directions = torch.rand(10, 192, generator=torch.Generator().manual_seed(0))
    return weights @ directions + torch.rand(n, 192, generator=generator) / 1000


@pytest.fixture
def eager(monkeypatch):
    """Codes cost nothing, so that they are used in small searches too; and references come in many parts."""
    for cost in ("_TRIAL_COST", "_PER_PAIR", "_DOUBLE", "_ROUNDING"):
        monkeypatch.setattr(neighbor_plan, cost, 0)
    monkeypatch.setattr(neighbor_plan, "has_integer_products", lambda: False)
    monkeypatch.setattr(neighbors, "_CODED", 600)
    monkeypatch.setattr(neighbors, "_TOGETHER", (13, 9))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", [Projection, Levels])
def test_parts_and_hard_queries_come_together(monkeypatch, kind):
    if kind is Levels:
        monkeypatch.setattr(neighbor_plan, "has_integer_products", lambda: True)
        monkeypatch.setattr(pruned_neighbors, "integer_products", lambda x, y: (x.double() @ y.double()).int())
        monkeypatch.setattr(neighbors, "_CODES", 600 * 192)
        monkeypatch.setattr(Levels, "of", lambda _: Levels(0.5, 64.0))  # so few that they leave candidates over
    references = torch.cat([low_rank(2100, seed=1), family("noise", 30, 192, seed=1)])
    queries = torch.cat([low_rank(20, seed=2), references[[0, 700, 2129]], family("noise", 9, 192, seed=2)])
    assert isinstance(plan_projection(queries, references, 5), kind)
    # More than two of 600 beside the seeds are too many.
    monkeypatch.setattr(pruned_neighbors, "candidate_cost", lambda *_: 300)
    monkeypatch.setattr(pruned_neighbors, "SPARE", 0)
    easy = []
    nearest = PrunedSearch.nearest
    monkeypatch.setattr(PrunedSearch, "nearest", lambda *args: easy.append(found := nearest(*args)) or found)
    done = []
    found = search_rows(queries, references, 5, progress=done.append)
    assert_found(queries, references, *found)
    assert len(easy) == 4 * 4  # blocks of 9 queries, in each of 4 parts
    assert 0 < torch.cat([rows for _, _, rows in easy]).double().mean() < 1
    assert done == sorted(done)
    assert done[-1] == len(queries)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_codes_of_other_types(dtype):
    queries, references = low_rank(20, seed=2), low_rank(2000, seed=1)
    if dtype == torch.uint8:
        queries, references = ((255 * rows).round().to(dtype) for rows in (queries, references))
        assert_found(queries / 255, references / 255, *search_rows(queries, references, 5))
    else:
        queries, references = queries.to(dtype), references.to(dtype)
        assert_found(queries, references, *search_rows(queries, references, 5))


@pytest.mark.usefixtures("eager")
def test_codes_must_save_more_where_8_bit_integers_are_multiplied(monkeypatch):
    monkeypatch.setattr(neighbors, "_CODED", 2100)
    queries, references = ((255 * low_rank(n, seed=n)).round().to(torch.uint8) for n in (64, 2100))
    for integers in (False, True):
        monkeypatch.setattr(neighbor_plan, "has_integer_products", lambda answer=integers: answer)
        assert (plan_projection(queries, references, 5) is None) is integers
        assert plan_projection(queries.float() / 255, references.float() / 255, 5) is not None
    images = queries.float() / 255, references.float() / 255
    monkeypatch.setattr(neighbor_plan, "INTEGERS_MOST", 192)
    assert isinstance(plan_projection(*images, 5), Levels)
    monkeypatch.setattr(neighbor_plan, "INTEGERS_MOST", 191)
    assert isinstance(plan_projection(*images, 5), Projection)  # 32 bits would not hold the products of levels
    monkeypatch.setattr(neighbor_plan, "_LENGTHS", (16,))
    assert plan_projection(queries[:, :48], references[:, :48], 5) is not None  # too narrow for these instructions


def test_the_plan_is_to_do_without_projections_on_noise_and_without_codes_in_small_searches(monkeypatch):
    monkeypatch.setattr(neighbor_plan, "has_integer_products", lambda: False)
    queries, references = low_rank(64, seed=2), low_rank(2100, seed=1)
    assert plan_projection(queries, references, 5) is None
    for cost in ("_TRIAL_COST", "_PER_PAIR", "_DOUBLE", "_ROUNDING"):
        monkeypatch.setattr(neighbor_plan, cost, 0)
    projection = plan_projection(queries, references, 5)
    assert projection is not None
    torch.testing.assert_close(projection.basis.T @ projection.basis, torch.eye(64).double(), rtol=0, atol=1e-12)
    noise = family("noise", 64, 192, seed=1), family("noise", 2100, 192, seed=2)
    assert plan_projection(*noise, 5) is None
    monkeypatch.setattr(neighbor_plan, "has_integer_products", lambda: True)
    assert isinstance(plan_projection(*noise, 5), Levels)  # which leave little out
    assert isinstance(plan_projection(queries, references, 5), Levels)
    monkeypatch.setattr(neighbor_plan, "_INTEGERS", 0.5)  # products of 64 columns of 192 take less
    assert isinstance(plan_projection(queries, references, 5), Projection)
    monkeypatch.setattr(neighbor_plan, "has_integer_products", lambda: False)
    assert plan_projection(queries, references, 1000) is None  # half of the references are neighbours


def test_a_trial_is_made_only_in_searches_of_20_times_its_cost(monkeypatch):
    queries, references = ((255 * low_rank(n, seed=n)).round().to(torch.uint8) for n in (64, 2100))
    trials = []
    monkeypatch.setattr(
        neighbor_plan, "principal_directions", lambda *args: trials.append(1) or principal_directions(*args)
    )
    for integers, share in ((False, 1), (True, 0.4)):
        monkeypatch.setattr(neighbor_plan, "has_integer_products", lambda answer=integers: answer)
        for cost, number in ((1.01, 0), (0.99, 1)):
            monkeypatch.setattr(neighbor_plan, "_TRIAL_COST", cost * share * 64 * 2100 / 20)
            plan_projection(queries, references, 5)
            assert len(trials) == number
            trials.clear()


@pytest.mark.skipif(not has_integer_products(), reason="this CPU has no fast products of 8-bit integers")
@pytest.mark.parametrize("level", [-128, 127])
def test_the_largest_sum_of_products_is_exact(level):
    x = torch.full((3, INTEGERS_MOST), level, dtype=torch.int8)
    y = torch.full((33, INTEGERS_MOST), -128, dtype=torch.int8)
    assert integer_products(x, y.T).unique().tolist() == [INTEGERS_MOST * level * -128]
