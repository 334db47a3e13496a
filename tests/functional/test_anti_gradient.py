"""The functions of AGC against a loop over samples, in float64."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from lightning_iet.functional.anti_gradient import (
    check_batch,
    keep_mask,
    masked_mean,
    update_anchored_bank,
    update_bank,
)

NUM_TIMESTEPS = 5
EXACT = {"rtol": 1e-12, "atol": 1e-12}

FINITE = st.floats(0, 1e3)
ANY = st.one_of(FINITE, st.sampled_from([math.nan, math.inf, -math.inf]))
UNIT = st.floats(0, 1)
DECAY = st.floats(0, 1, exclude_max=True)


def batches(losses=ANY):
    """Lists of (loss, timestep); with 5 timesteps and up to 40 samples, most batches hold duplicates."""
    return st.lists(st.tuples(losses, st.integers(0, NUM_TIMESTEPS - 1)), max_size=40)


BANKS = st.lists(st.floats(0, 10), min_size=NUM_TIMESTEPS, max_size=NUM_TIMESTEPS)


def tensors(batch):
    losses = torch.tensor([loss for loss, _ in batch], dtype=torch.float64)
    return losses, torch.tensor([timestep for _, timestep in batch], dtype=torch.long)


def naive(batch, bank, threshold, decay):
    """METHODS, sample by sample: (which are kept, the loss, the gradient of each sample, the new bank)."""
    keep = [not math.isfinite(loss) or loss >= threshold * bank[t] for loss, t in batch]
    kept = max(1, sum(keep))
    loss = sum(value for (value, _), k in zip(batch, keep, strict=True) if k) / kept
    gradient = [k / kept for k in keep]
    bank = list(bank)
    for value, t in batch:
        if math.isfinite(value):
            bank[t] = decay * bank[t] + (1 - decay) * value
    return keep, loss, gradient, bank


@given(batches(), BANKS, UNIT, DECAY)
@example([], [1.0] * NUM_TIMESTEPS, 0.5, 0.8)
@example([(0.1, 2), (0.2, 2), (0.3, 2)], [10.0] * NUM_TIMESTEPS, 0.5, 0.8)  # nothing is kept
@example([(math.nan, 0), (math.inf, 0), (1.0, 0)], [10.0] * NUM_TIMESTEPS, 1.0, 0.0)
def test_equals_the_loop(batch, bank, threshold, decay):
    losses, timesteps = tensors(batch)
    losses.requires_grad_()
    before = torch.tensor(bank, dtype=torch.float64)

    keep = keep_mask(losses, timesteps, before, threshold)
    loss = masked_mean(losses, keep)
    loss.backward()
    after = update_bank(before, losses, timesteps, decay)

    expected_keep, expected_loss, expected_gradient, expected_bank = naive(batch, bank, threshold, decay)
    assert keep.tolist() == expected_keep
    assert_close(loss.item(), float(expected_loss), equal_nan=True, **EXACT)
    assert_close(losses.grad, torch.tensor(expected_gradient, dtype=torch.float64), **EXACT)
    assert_close(after, torch.tensor(expected_bank, dtype=torch.float64), **EXACT)
    assert before.tolist() == bank  # not changed in place
    assert not after.requires_grad


@given(batches(FINITE), BANKS, DECAY)
def test_bank_does_not_depend_on_where_a_batch_is_cut(batch, bank, decay):
    losses, timesteps = tensors(batch)
    bank = torch.tensor(bank, dtype=torch.float64)
    cut = len(batch) // 3
    in_two = update_bank(update_bank(bank, losses[:cut], timesteps[:cut], decay), losses[cut:], timesteps[cut:], decay)
    assert_close(update_bank(bank, losses, timesteps, decay), in_two, **EXACT)


@given(batches(st.floats(allow_nan=True, allow_infinity=True)), BANKS)
def test_threshold_zero_keeps_everything(batch, bank):
    losses, timesteps = tensors(batch)
    assert keep_mask(losses, timesteps, torch.tensor(bank, dtype=torch.float64), 0.0).all()


@given(batches(), BANKS, DECAY)
def test_bank_stays_between_what_it_saw(batch, bank, decay):
    losses, timesteps = tensors(batch)
    before = torch.tensor(bank, dtype=torch.float64)
    after = update_bank(before, losses, timesteps, decay)
    assert after.isfinite().all()
    for t in range(NUM_TIMESTEPS):
        seen = [loss for loss, s in batch if s == t and math.isfinite(loss)]
        if not seen:
            assert after[t] == before[t]  # bit for bit
        assert min([*seen, bank[t]]) - 1e-9 <= after[t] <= max([*seen, bank[t]]) + 1e-9


def test_a_large_batch_of_one_timestep():
    losses = torch.rand(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 3.0
    for loss in losses.tolist():
        expected = 0.8 * expected + 0.2 * loss
    after = update_bank(torch.tensor([3.0], dtype=torch.float64), losses, torch.zeros(4096, dtype=torch.long), 0.8)
    assert_close(after.item(), expected, **EXACT)


def test_decay_zero_remembers_the_last_loss():
    after = update_bank(torch.tensor([9.0, 9.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 0]), decay=0.0)
    assert after.tolist() == [3.0, 9.0]


def test_mask_by_hand():
    bank = torch.tensor([0.0, 1.0, 2.0])
    losses = torch.tensor([0.0, 0.5, 0.49, 1.0, 0.99, math.nan, math.inf, -math.inf])
    keep = keep_mask(losses, torch.tensor([0, 1, 1, 2, 2, 2, 2, 2]), bank, threshold=0.5)
    assert keep.tolist() == [True, True, False, True, False, True, True, True]


def test_nothing_kept_gives_zero_gradients_for_every_weight():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = masked_mean(weight**2, torch.tensor([False, False]))
    loss.backward()
    assert loss.item() == 0
    assert weight.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_dropped_loss_cannot_poison(bad):
    losses = torch.tensor([bad, 2.0], requires_grad=True)
    loss = masked_mean(losses, torch.tensor([False, True]))
    loss.backward()
    assert loss.item() == 2
    assert losses.grad.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_non_finite_loss_stays_visible(bad):
    losses = torch.tensor([bad, 2.0])
    keep = keep_mask(losses, torch.tensor([0, 0]), torch.tensor([1.0]), threshold=0.5)
    assert not masked_mean(losses, keep).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_the_type_of_the_bank(dtype):
    losses = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=dtype)
    timesteps = torch.tensor([0, 1, 1, 1])
    bank = torch.tensor([0.3, 0.3])
    exact = losses.float()
    assert keep_mask(losses, timesteps, bank, 0.5).tolist() == [False, True, True, True]
    assert torch.equal(update_bank(bank, losses, timesteps, 0.8), update_bank(bank, exact, timesteps, 0.8))
    assert update_bank(bank, losses, timesteps, 0.8).dtype == torch.float32


def test_half_precision_mean_does_not_overflow():
    losses = torch.full((4096,), 100.0, dtype=torch.float16, requires_grad=True)
    loss = masked_mean(losses, torch.ones(4096, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 100
    assert loss.dtype == losses.dtype == losses.grad.dtype
    assert_close(losses.grad.float().sum().item(), 1.0)


def test_a_loss_too_large_for_the_bank_is_not_learnt():
    losses = torch.tensor([1e300, 1.0], dtype=torch.float64)
    assert update_bank(torch.zeros(1), losses, torch.tensor([0, 0]), 0.5).tolist() == [0.5]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_type_is_a_timestep(dtype):
    losses, timesteps, bank = torch.tensor([1.0, 4.0]), torch.tensor([1, 1], dtype=dtype), torch.tensor([7.0, 3.0])
    assert keep_mask(losses, timesteps, bank, 0.5).tolist() == [False, True]
    assert_close(update_bank(bank, losses, timesteps, 0.5), torch.tensor([7.0, 3.0]))


@pytest.mark.parametrize("timestep", [-1, 2])
def test_a_timestep_out_of_range_does_not_wrap_around(timestep):
    with pytest.raises(IndexError):
        keep_mask(torch.ones(1), torch.tensor([timestep]), torch.zeros(2), 0.5)
    with pytest.raises(IndexError):
        update_bank(torch.zeros(2), torch.ones(1), torch.tensor([timestep]), 0.5)


@pytest.mark.parametrize(
    ("losses", "timesteps", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(2).long(), ValueError, r"Argument `losses` expected one loss .*got \(2, 3\)"),
        (torch.tensor(1.0), torch.ones(2).long(), ValueError, r"Argument `losses` expected one loss .*got \(\)"),
        (torch.ones(2), torch.ones(3).long(), ValueError, r"Argument `timesteps` expected the shape .*got \(3,\)"),
        (torch.ones(2).long(), torch.ones(2).long(), TypeError, "Argument `losses` expected a floating-point .*int64"),
        (torch.ones(2), torch.ones(2), TypeError, "Argument `timesteps` expected integers, but got torch.float32"),
        (torch.ones(2), torch.ones(2).bool(), TypeError, "Argument `timesteps` expected integers, but got torch.bool"),
    ],
)
def test_bad_batches(losses, timesteps, error, message):
    for call in (
        lambda: check_batch(losses, timesteps),
        lambda: keep_mask(losses, timesteps, torch.zeros(5), 0.5),
        lambda: update_bank(torch.zeros(5), losses, timesteps, 0.5),
    ):
        with pytest.raises(error, match=message):
            call()


def test_masked_mean_wants_one_answer_per_loss():
    with pytest.raises(ValueError, match=r"Argument `keep` expected .*\(2,\), but got \(3,\)"):
        masked_mean(torch.ones(2), torch.ones(3, dtype=torch.bool))


def test_an_accelerator_is_never_waited_for():
    with FakeTensorMode():  # tensors without values: raises when one is asked for, or when devices are mixed
        losses = torch.rand(8, device="cuda")
        timesteps = torch.randint(9, (8,), device="cuda")
        bank = torch.zeros(9, device="cuda")
        assert masked_mean(losses, keep_mask(losses, timesteps, bank, 0.5)).device == losses.device
        assert update_bank(bank, losses, timesteps, 0.8).device == losses.device


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
