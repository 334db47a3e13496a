from dataclasses import astuple
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from lightning_iet.audit.statistics import excess, nearer_distances, nearer_share, share

COUNTS = st.integers(1, 200).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))


@given(COUNTS)
def test_wilson_interval(counts):
    """The ends are the shares p from which the count lies 1.96 standard deviations of p away."""
    count, total = counts
    found = share(count, total)
    assert 0 <= found.low <= found.share <= found.high <= 1
    for end in (found.low, found.high):
        if 0 < end < 1:
            distance = abs(found.share - end)
            assert distance == pytest.approx(1.959964 * (end * (1 - end) / total) ** 0.5, rel=1e-4)


@given(COUNTS)
def test_wilson_interval_equals_that_of_scipy(counts):
    interval = binomtest(*counts).proportion_ci(0.95, method="wilson")
    found = share(*counts)
    assert (found.low, found.high) == (interval.low, interval.high)


@given(COUNTS, COUNTS)
def test_p_value_is_that_of_counting_all_tables(first, second):
    (a, m), (b, n) = first, second
    total = comb(m + n, a + b)
    chance = sum(comb(m, i) * comb(n, a + b - i) for i in range(a, min(m, a + b) + 1)) / total
    found = excess(share(a, m), share(b, n))
    assert found.p_value == pytest.approx(chance, abs=1e-9)
    assert found.low - 1e-12 <= found.difference <= found.high + 1e-12


def test_newcombe_interval_of_a_published_example():
    """Newcombe 1998, table II, example (a): 56/70 and 48/80, method 10."""
    found = excess(share(56, 70), share(48, 80))
    assert [round(part, 4) for part in astuple(found)[:3]] == [0.2, 0.0524, 0.3339]


@given(COUNTS, COUNTS)
def test_shares_are_nearer_if_larger_beyond_chance(first, second):
    (a, m), (b, n) = first, second
    total = comb(m + n, a + b)
    chance = sum(comb(m, i) * comb(n, a + b - i) for i in range(a, min(m, a + b) + 1)) / total
    found = nearer_share("MQ", share(a, m), share(b, n))
    assert (found is not None) == (chance < 0.01)
    if found is not None:
        assert (found.generated, found.held_out) == (a / m, b / n)
        assert found.is_large == (10 * a * n >= 10 * b * m + m * n)  # a / m >= b / n + 0.1


@pytest.mark.parametrize(
    ("factor", "count", "told"), [(0.97, 2000, True), (0.97, 50, False), (1.0, 2000, False), (1.1, 2000, False)]
)
def test_median_distances(factor, count, told):
    near = 1 + torch.rand(count, generator=torch.Generator().manual_seed(0))
    found = nearer_distances("distance", factor * near, near)
    assert (found is not None) == told
    if found is not None:
        assert found.generated == pytest.approx(factor * found.held_out)
        assert not found.is_large
