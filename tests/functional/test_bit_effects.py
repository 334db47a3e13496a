"""Effects of bits, against NumPy's least squares and against differences of means."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional.bit_effects import bit_effects


def drawn(trials, groups, seed=0):
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 2, (trials, groups))
    rates = generator.uniform(-5, -3, trials)
    values = bits @ generator.normal(size=groups) + 0.3 * rates**2 + generator.normal(size=trials)
    return bits, rates, values


def by_numpy(design, values):
    """Coefficients and their standard errors from the normal equations, in NumPy."""
    coefficients, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    assert rank == design.shape[1]
    freedom = len(values) - design.shape[1]
    variance = ((values - design @ coefficients) ** 2).sum() / freedom
    return coefficients, np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design))), freedom


@given(st.integers(0, 1000))
def test_all_bits_together_are_the_least_squares_of_numpy(seed):
    bits, rates, values = drawn(40, 5, seed)
    covariates = np.stack([rates, rates**2], 1)
    found = bit_effects(torch.tensor(bits), torch.tensor(values), covariates=torch.tensor(covariates))
    expected, errors, freedom = by_numpy(np.column_stack([np.ones(40), bits, covariates]), values)
    assert found.joint
    assert found.degrees_of_freedom == freedom
    np.testing.assert_allclose(found.effect, expected[1:6], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found.standard_error, errors[1:6], rtol=1e-8)


def test_with_few_trials_each_bit_has_a_fit_of_its_own():
    bits, rates, values = drawn(8, 12, seed=3)
    bits[:, 4] = 1  # one that never changes
    found = bit_effects(torch.tensor(bits), torch.tensor(values), covariates=torch.tensor(rates)[:, None])
    assert not found.joint
    for group in range(12):
        if group == 4:
            assert found.effect[4].isnan()
            assert found.standard_error[4].isnan()
            continue
        expected, errors, freedom = by_numpy(np.column_stack([np.ones(8), bits[:, group], rates]), values)
        assert found.effect[group].item() == pytest.approx(expected[1], rel=1e-8)
        assert found.standard_error[group].item() == pytest.approx(errors[1], rel=1e-8)
        assert found.degrees_of_freedom == freedom


def test_without_covariates_a_single_bit_is_a_difference_of_means():
    bits = torch.tensor([[0], [0], [0], [1], [1]])
    values = torch.tensor([1.0, 2.0, 3.0, 6.0, 8.0])
    found = bit_effects(bits, values)
    pooled = (2 + 2) / 3  # squares around each mean, over 5 - 2
    assert found.effect.item() == pytest.approx(5)
    assert found.standard_error.item() == pytest.approx((pooled * (1 / 3 + 1 / 2)) ** 0.5)


@pytest.mark.parametrize("trials", [0, 1, 2])
def test_too_few_trials_say_nothing(trials):
    found = bit_effects(torch.eye(3)[:trials], torch.arange(float(trials)))
    assert found.effect.isnan().all()
    assert found.standard_error.isnan().all()
    assert found.degrees_of_freedom == 0


def test_bits_that_always_go_together_cannot_be_told_apart():
    bits = torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1], [1, 1], [0, 0]])
    found = bit_effects(bits, torch.tensor([0.0, 1.0, 4.0, 5.0, 6.0, 2.0]))
    assert not found.joint
    assert found.effect.tolist() == pytest.approx([4.0, 4.0])


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"shapes \(N, G\), \(N,\) and \(N, C\), but got \(3, 2\), \(4,\)"):
        bit_effects(torch.zeros(3, 2), torch.zeros(4))
