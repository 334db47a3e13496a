import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional.binning import bin_index, equal_probability_edges


def edges_by_hand(samples, num_bins):
    """Quantiles one after the other, interpolated."""
    ordered, edges = sorted(samples), []
    for i in range(1, num_bins):
        whole, rest = divmod(i * (len(ordered) - 1), num_bins)
        above = ordered[min(whole + 1, len(ordered) - 1)]
        edges.append(ordered[whole] + (above - ordered[whole]) * rest / num_bins)
    return edges


@given(
    samples=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    num_bins=st.integers(1, 50),
)
def test_equals_a_loop(samples, num_bins):
    values = torch.tensor(samples, dtype=torch.float64)
    edges = equal_probability_edges(values, num_bins)
    expected = torch.tensor(edges_by_hand(samples, num_bins), dtype=torch.float64)
    torch.testing.assert_close(edges, expected, rtol=1e-12, atol=1e-6)
    assert (edges.diff() >= 0).all()
    found = bin_index(values, edges)
    assert found.tolist() == [sum(value >= edge for edge in edges.tolist()) for value in samples]


@pytest.mark.parametrize("draw", [torch.rand, torch.randn, lambda n: torch.randn(n).exp()])
def test_bins_are_equally_probable(draw):
    edges = equal_probability_edges(draw(50_000), 20)
    shares = torch.bincount(bin_index(draw(50_000), edges), minlength=20) / 50_000
    torch.testing.assert_close(shares, torch.full((20,), 0.05), rtol=0, atol=0.008)


@pytest.mark.parametrize(
    ("samples", "num_bins", "message"),
    [
        (torch.zeros(0), 4, r"`samples` expected shape \(n,\) with n ≥ 1, but got \(0,\)"),
        (torch.zeros(2, 3), 4, r"`samples` expected .* but got \(2, 3\)"),
        (torch.zeros(3), 0, "`num_bins` expected at least 1, but got 0"),
    ],
)
def test_bad_input(samples, num_bins, message):
    with pytest.raises(ValueError, match=message):
        equal_probability_edges(samples, num_bins)
