"""Strengths and magnitudes of the augmentation against a loop over samples."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from lightning_iet.functional.anti_gradient import keep_mask
from lightning_iet.functional.threshold_aware_augmentation import (
    augmentation_magnitude,
    augmentation_strength,
    check_augmentation,
)


def naive(loss, usual, threshold, sharpness, band):
    if not math.isfinite(loss) or usual == 0:
        return 0.0
    ratio = loss / (threshold * usual)
    return math.exp(-sharpness * (ratio - 1)) if 1 <= ratio < band else 0.0


LOSSES = st.floats(0, 3) | st.sampled_from([math.nan, math.inf, 0.4, 0.8, 1.2])


@given(
    st.lists(st.tuples(LOSSES, st.integers(0, 3)), max_size=20),
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]) | st.floats(0.01, 3), min_size=4, max_size=4),
    st.sampled_from([0.25, 0.5, 0.8, 1.0]),
    st.sampled_from([1.0, 5.0]),
    st.sampled_from([1.1, 1.5, math.inf]),
)
def test_equals_the_loop(samples, bank, threshold, sharpness, band):
    losses = torch.tensor([loss for loss, _ in samples], dtype=torch.float64)
    timesteps = torch.tensor([t for _, t in samples], dtype=torch.long)
    banks = torch.tensor(bank, dtype=torch.float64)
    found = augmentation_strength(losses, timesteps, banks, threshold, sharpness=sharpness, band=band)
    expected = [naive(loss, bank[t], threshold, sharpness, band) for loss, t in samples]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    skipped = ~keep_mask(losses, timesteps, banks, threshold)
    assert (found[skipped] == 0).all()


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_on_the_threshold_gets_all(threshold, dtype):
    bank = torch.rand(100, dtype=dtype) + 0.01
    timesteps = torch.arange(100)
    limits = threshold * bank
    assert (augmentation_strength(limits, timesteps, bank, threshold) == 1).all()
    below = torch.nextafter(limits, torch.zeros_like(limits))
    assert (augmentation_strength(below, timesteps, bank, threshold) == 0).all()


def test_magnitudes_that_result():
    ratios = torch.tensor([1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.33, 1.49, 1.5, 0.99], dtype=torch.float64)
    strength = augmentation_strength(0.8 * ratios, torch.zeros(10).long(), torch.ones(1, dtype=torch.float64), 0.8)
    assert augmentation_magnitude(strength).tolist() == [5, 3, 3, 2, 1, 1, 0, 0, 0, 0]
    assert augmentation_magnitude(strength, 0).tolist() == [0] * 10
    assert augmentation_magnitude(strength, 30).tolist() == [math.floor(30 * a) for a in strength.tolist()]


def test_no_gradient_and_no_wait():
    losses = torch.rand(5, requires_grad=True)
    assert not augmentation_strength(losses, torch.zeros(5).long(), torch.ones(1), 0.5).requires_grad
    with FakeTensorMode():  # tensors without values: raises when one is asked for, or when devices are mixed
        losses, bank = torch.rand(5, device="cuda").half(), torch.ones(3, device="cuda")
        strength = augmentation_strength(losses, torch.zeros(5, device="cuda").long(), bank, 0.5)
        assert augmentation_magnitude(strength).device == losses.device


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_magnitude": 31}, "Argument `max_magnitude` expected an integer in 0 … 30, but got 31. 5 was published"),
        ({"max_magnitude": -1}, "Argument `max_magnitude` .* but got -1"),
        ({"band": 1.0}, "Argument `band` expected a number above 1, but got 1.0. 1.5 was published"),
        ({"band": math.nan}, "Argument `band` .* but got nan"),
        ({"sharpness": 0.0}, "Argument `sharpness` expected a number above 0, but got 0.0. 5 was published"),
        ({"num_ops": 0}, "Argument `num_ops` expected an integer ≥ 1, but got 0. 2 was published"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        check_augmentation(**kwargs)
