import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional import average_minimum_distance as module
from lightning_iet.functional.average_minimum_distance import (
    average_minimum_distance,
    nearest_cosine_distance,
    unit_rows,
)


def cosine_distance(x, y):
    """From the definition, number by number."""
    product = sum(a * b for a, b in zip(x, y, strict=True))
    return 1 - product / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in y))


def naive(generated, train):
    nearest = [min(cosine_distance(x, y) for y in train.tolist()) for x in generated.tolist()]
    return sum(nearest) / len(nearest)


@given(seed=st.integers(0, 1000), width=st.integers(2, 6), num=st.integers(1, 8))
def test_equals_the_double_loop(seed, width, num):
    draw = torch.Generator().manual_seed(seed)
    generated = torch.randn(num, width, generator=draw) * 10
    train = torch.randn(7, width, generator=draw)
    assert average_minimum_distance(generated, train).item() == pytest.approx(
        naive(generated, train), rel=1e-4, abs=1e-6
    )


@given(seed=st.integers(0, 1000))
def test_the_order_does_not_matter(seed):
    draw = torch.Generator().manual_seed(seed)
    generated, train = torch.randn(2, 9, 4, generator=draw)
    found = average_minimum_distance(generated.flip(0), train[torch.randperm(9, generator=draw)])
    torch.testing.assert_close(found, average_minimum_distance(generated, train))


def test_small_distances_are_exact():
    angle = 1e-4  # 1 - cos(angle) = 5e-9, which 1 - cos in float32 rounds to 0 or 6e-8
    found = average_minimum_distance(torch.tensor([[math.cos(angle), math.sin(angle)]]), torch.tensor([[1.0, 0.0]]))
    assert found.item() == pytest.approx(angle**2 / 2, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 7.3, 1e6])
def test_a_scaled_copy_is_at_distance_zero(scale):
    train = torch.rand(20, 100)
    assert average_minimum_distance(scale * train[:5], train).item() == pytest.approx(0, abs=1e-12)


def test_rows_of_zeros_are_nobodys_neighbours():
    zero, one = torch.zeros(1, 3), torch.tensor([[-1.0, 0.0, 0.0]])
    train = unit_rows(torch.cat([zero, torch.tensor([[1.0, 0.0, 0.0]])]))
    assert nearest_cosine_distance(one, train).tolist() == [2]
    assert nearest_cosine_distance(one, train, norms=train.square().sum(dim=1)).tolist() == [2]
    assert nearest_cosine_distance(zero, train).tolist() == [1]
    assert nearest_cosine_distance(one, zero).tolist() == [1]


def test_rows_are_scaled_block_by_block(monkeypatch):
    rows = torch.randn(20, 5)
    expected = unit_rows(rows)
    monkeypatch.setattr(module, "_FLOATS", 12)
    assert torch.equal(unit_rows(rows), expected)
    assert unit_rows(rows[:0]).shape == (0, 5)


@pytest.mark.parametrize("angle", [1e-3, 1e-4, 1e-5, 1e-6])
def test_the_error_of_small_distances_is_what_the_docstring_says(angle):
    draw = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(50, 64, dtype=torch.float64, generator=draw))
    other = torch.randn(50, 64, dtype=torch.float64, generator=draw)
    other = torch.nn.functional.normalize(other - (other * rows).sum(dim=1, keepdim=True) * rows)
    turned = rows * math.cos(angle) + other * math.sin(angle)
    true = 2 * math.sin(angle / 2) ** 2
    found = nearest_cosine_distance(unit_rows(turned), unit_rows(rows)).double()
    assert (found - true).abs().max() <= 2e-7 * true**0.5 + 1e-4 * true
