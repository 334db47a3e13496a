"""The loss bank of unseen images against a loop over timesteps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from lightning_iet.functional.anti_gradient import masked_mean, update_anchored_bank

LOSSES = st.one_of(st.floats(0, 10), st.sampled_from([math.nan, math.inf]))
SAMPLES = st.lists(st.tuples(st.integers(0, 3), LOSSES), max_size=12)


@given(SAMPLES, st.lists(st.floats(0, 10), min_size=4, max_size=4), st.floats(0, 0.99))
def test_equals_a_loop(samples, bank, decay):
    expected = list(bank)
    for t in range(4):
        found = [loss for step, loss in samples if step == t and math.isfinite(loss)]
        if found:
            share = decay ** len(found)
            expected[t] = share * bank[t] + (1 - share) * sum(found) / len(found)
    timesteps = torch.tensor([step for step, _ in samples], dtype=torch.long)
    losses = torch.tensor([loss for _, loss in samples], dtype=torch.float64)
    before = torch.tensor(bank, dtype=torch.float64)
    updated = update_anchored_bank(before, losses, timesteps, decay)
    assert_close(updated.tolist(), expected, rtol=1e-12, atol=1e-12)
    assert before.tolist() == bank
    untouched = [t for t in range(4) if not any(step == t and math.isfinite(loss) for step, loss in samples)]
    assert updated[untouched].tolist() == [bank[t] for t in untouched]  # to the last bit


def test_order_does_not_matter_and_one_by_one_is_the_same_for_equal_losses():
    losses, timesteps = torch.rand(9, dtype=torch.float64), torch.randint(3, (9,))
    bank, order = torch.rand(3, dtype=torch.float64), torch.randperm(9)
    at_once = update_anchored_bank(bank, losses, timesteps, 0.9)
    assert_close(update_anchored_bank(bank, losses[order], timesteps[order], 0.9), at_once)
    halves = bank
    for part in (slice(4), slice(4, None)):
        halves = update_anchored_bank(halves, torch.full_like(losses, 0.3)[part], timesteps[part], 0.9)
    assert_close(halves, update_anchored_bank(bank, torch.full_like(losses, 0.3), timesteps, 0.9))


def test_takes_no_gradient_and_does_not_wait():
    losses = torch.rand(5, requires_grad=True)
    assert not update_anchored_bank(torch.zeros(3), losses, torch.zeros(5).int(), 0.9).requires_grad
    with FakeTensorMode():  # tensors without values: raises when one is asked for
        bank = update_anchored_bank(
            torch.zeros(3, device="cuda"),
            torch.rand(5, device="cuda").half(),
            torch.zeros(5, device="cuda").long(),
            0.9,
        )
        assert (bank.device.type, bank.dtype) == ("cuda", torch.float32)


@pytest.mark.parametrize(("timesteps", "error"), [(torch.zeros(3).long(), ValueError), (torch.zeros(4), TypeError)])
def test_bad_input(timesteps, error):
    with pytest.raises(error, match="Argument `timesteps` expected"):
        update_anchored_bank(torch.zeros(3), torch.rand(4), timesteps, 0.9)


def test_a_mean_over_the_batch_shrinks_as_samples_drop_out():
    losses = torch.tensor([1.0, 2.0, 6.0, 8.0], requires_grad=True)
    mean = masked_mean(losses, torch.tensor([True, False, True, False]), divisor=4)
    mean.backward()
    assert mean.item() == 1.75
    assert losses.grad.tolist() == [0.25, 0, 0.25, 0]
    assert masked_mean(losses, torch.zeros(4).bool(), divisor=4).item() == 0
