import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional.exhaustive_neighbors import (
    ExhaustiveSearch,
    _partial_distances,
    _usual_rounding,
    float_rows,
    rounding,
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
    estimates = (_partial_distances(rows, rows, norms) + norms[:, None]).double()
    lengths = norms.double().sqrt() + norms.double().sqrt()[:, None]
    distances = torch.stack([(row.double() - rows.double()).square().sum(dim=1) for row in rows])
    assert ((estimates - distances).abs() <= bound(lengths, dimension) + 1e-30).all()


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
