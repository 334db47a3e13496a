import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from lightning_iet.functional.mifid import frechet_distance, moments, moments_of_sums


def reference(real, fake):
    """The formula, with scipy's matrix square root."""
    (mean_1, cov_1), (mean_2, cov_2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (real, fake))
    return ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * sqrtm(cov_1 @ cov_2).real)


@given(seed=st.integers(0, 1000), sizes=st.tuples(st.integers(10, 60), st.integers(10, 60)), width=st.integers(2, 8))
def test_equals_the_formula(seed, sizes, width):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=draw)
    first, second = torch.randn(sizes[0], width, generator=draw), torch.randn(sizes[1], width, generator=draw) @ mix + 1
    found = frechet_distance(moments(first), moments(second)).item()
    assert found == pytest.approx(reference(first.double().numpy(), second.double().numpy()), rel=1e-6)


def test_equals_torchmetrics_with_fewer_images_than_features():
    from torchmetrics.image.fid import _compute_fid

    first, second = moments(torch.rand(10, 64)), moments(torch.rand(12, 64) * 2)
    assert frechet_distance(first, second).item() == pytest.approx(_compute_fid(*first, *second).item(), rel=1e-4)


def test_equal_sets_are_at_distance_zero():
    features = torch.rand(20, 50) * 100
    assert frechet_distance(moments(features), moments(features)).item() == pytest.approx(0, abs=1e-6)


@given(seed=st.integers(0, 1000))
def test_is_symmetric(seed):
    draw = torch.Generator().manual_seed(seed)
    first, second = moments(torch.randn(9, 4, generator=draw)), moments(torch.randn(8, 4, generator=draw))
    torch.testing.assert_close(frechet_distance(first, second), frechet_distance(second, first))


def test_sums_give_the_same_moments():
    rows = torch.randn(40, 5)
    double = rows.double()
    found = moments_of_sums(torch.tensor(40), double.sum(dim=0), double.T @ double)
    for value, expected in zip(found, moments(rows), strict=True):
        torch.testing.assert_close(value, expected)
