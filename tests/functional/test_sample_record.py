"""The record of each sample against METHODS 2c, draw by draw."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from lightning_iet.functional.sample_record import (
    LogLossStatistics,
    keep_by_record,
    last_of_each,
    standardized_losses,
    sum_by_index,
    typical_record,
    update_log_loss_statistics,
    update_log_weights,
    update_record,
    weighted_mean,
)

NUM_BINS, NUM_SAMPLES = 3, 6
EXACT = {"rtol": 1e-9, "atol": 1e-9}
LOSSES = st.one_of(st.floats(1e-3, 10), st.sampled_from([math.nan, math.inf, 0.0, -1.0, 0.5, 0.5]))
BATCHES = st.lists(
    st.lists(st.tuples(LOSSES, st.integers(0, NUM_BINS - 1), st.integers(0, NUM_SAMPLES - 1)), max_size=12), max_size=5
)
DECAY = st.floats(0, 0.99)


def has_logarithm(loss):
    return math.isfinite(loss) and loss > 0


def columns(batch):
    losses, bins, index = zip(*batch, strict=True) if batch else ((), (), ())
    return (
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor(bins, dtype=torch.long),
        torch.tensor(index, dtype=torch.long),
    )


def empty():
    statistics = LogLossStatistics.empty(NUM_BINS)
    return LogLossStatistics(statistics.mean.double(), statistics.variance.double(), statistics.num_values)


@given(BATCHES, DECAY)
@example([[(1.0, 0, 0)], [(2.0, 0, 0), (4.0, 0, 0)]], 0.0)
def test_statistics_are_those_of_all_values_by_weight(batches, decay):
    """A value of a batch loses a factor of the decay for every value of a later batch in its bin."""
    statistics = empty()
    values = [[] for _ in range(NUM_BINS)]  # (log-loss, weight)
    for batch in batches:
        losses, bins, _ = columns(batch)
        statistics = update_log_loss_statistics(statistics, losses, bins, decay)
        for bin_ in range(NUM_BINS):
            news = [math.log(loss) for loss, b, _ in batch if b == bin_ and has_logarithm(loss)]
            if news:
                share = decay ** len(news)
                # within a batch all count alike, and together as much as one after the other would
                weight = (1 - share) / (1 - decay) / len(news)
                values[bin_] = [(x, w * share) for x, w in values[bin_]] + [(x, weight) for x in news]
    for bin_, weighted in enumerate(values):
        assert statistics.num_values[bin_] == len(weighted)
        total = sum(w for _, w in weighted)
        if total:
            mean = sum(w * x for x, w in weighted) / total
            variance = sum(w * (x - mean) ** 2 for x, w in weighted) / total
            assert_close(statistics.mean[bin_].item(), mean, **EXACT)
            assert_close(statistics.variance[bin_].item(), variance, **EXACT)


def test_statistics_stay_as_they_are_where_nothing_arrives():
    before = LogLossStatistics(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([7, 0]))
    after = update_log_loss_statistics(before, torch.tensor([math.nan, 2.0]), torch.tensor([0, 1]), 0.9)
    assert (after.mean[0], after.variance[0], after.num_values[0]) == (1, 3, 7)
    assert_close(after.mean[1], torch.tensor(math.log(2)))
    assert after.variance[1] == 0
    assert before.num_values.tolist() == [7, 0]  # not changed in place


@given(BATCHES, st.integers(1, 6))
def test_scores_equal_the_loop(batches, min_values):
    statistics = empty()
    for batch in batches:
        losses, bins, _ = columns(batch)
        found = standardized_losses(losses, bins, statistics, min_values=min_values)
        expected = [
            (math.log(loss) - statistics.mean[b].item()) / max(math.sqrt(statistics.variance[b].item()), 1e-3)
            if statistics.num_values[b] >= min_values and has_logarithm(loss)
            else 0.0
            for loss, b, _ in batch
        ]
        assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)
        statistics = update_log_loss_statistics(statistics, losses, bins, 0.9)


SCORES = st.lists(st.tuples(st.integers(0, NUM_SAMPLES - 1), st.floats(-5, 5), st.booleans()), max_size=15)


@given(SCORES, st.lists(st.floats(-3, 3), min_size=NUM_SAMPLES, max_size=NUM_SAMPLES), DECAY)
@example([(2, 1.0, False), (2, 2.0, True), (2, 3.0, False)], [0.0] * NUM_SAMPLES, 0.8)
def test_records_and_weights_equal_the_loop(draws, start, decay):
    index = torch.tensor([i for i, _, _ in draws], dtype=torch.long)
    scores = torch.tensor([z for _, z, _ in draws], dtype=torch.float64)
    absent = torch.tensor([a for _, _, a in draws], dtype=torch.bool)
    record = torch.tensor(start, dtype=torch.float64)
    expected = list(start)
    for i, z, is_absent in draws:
        if not is_absent:
            expected[i] = decay * expected[i] + (1 - decay) * z

    found = update_record(record, index, scores, decay, absent=absent)
    assert_close(record.tolist(), expected, **EXACT)
    assert_close(found.tolist(), [expected[i] for i, _, _ in draws], **EXACT)
    untouched = [i for i in range(NUM_SAMPLES) if i not in index.tolist()]
    assert [record[i].item() for i in untouched] == [start[i] for i in untouched]  # to the last bit

    log_weights = torch.linspace(-3.9, 0, NUM_SAMPLES, dtype=torch.float64)
    weights = log_weights.tolist()
    for i, number in Counter(i for i, _, a in draws if not a).items():
        weights[i] = min(max(weights[i] + number * 0.3 * (expected[i] - 0.1), math.log(0.02)), 0.0)
    factors = update_log_weights(log_weights, index, found, torch.tensor(0.1, dtype=torch.float64), 0.3, absent=absent)
    assert_close(log_weights.tolist(), weights, **EXACT)
    assert_close(factors.tolist(), [math.exp(weights[i]) for i, _, _ in draws], **EXACT)


@given(SCORES, DECAY)
def test_a_batch_may_be_cut_anywhere(draws, decay):
    index = torch.tensor([i for i, _, _ in draws], dtype=torch.long)
    scores = torch.tensor([z for _, z, _ in draws], dtype=torch.float64)
    whole, cut = (torch.zeros(NUM_SAMPLES, dtype=torch.float64) for _ in range(2))
    update_record(whole, index, scores, decay)
    half = len(draws) // 2
    for part in (slice(half), slice(half, None)):
        update_record(cut, index[part], scores[part], decay)
    assert_close(whole, cut, **EXACT)


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-5, 5)), max_size=15))
def test_sums_and_last_draws_equal_the_loop(rows):
    index = torch.tensor([i for i, _ in rows], dtype=torch.long)
    values = torch.tensor([x for _, x in rows], dtype=torch.float64)
    assert_close(sum_by_index(index, values).tolist(), [sum(x for j, x in rows if j == i) for i, _ in rows], **EXACT)
    last = {i: place for place, (i, _) in enumerate(rows)}
    assert last_of_each(index).tolist() == [last[i] == place for place, (i, _) in enumerate(rows)]


def test_the_median_is_of_those_that_were_drawn():
    record = torch.tensor([-9.0, 4.0, 1.0, 3.0, 2.0])
    assert typical_record(record, torch.tensor([0, 1, 1, 1, 1])) == 2  # the lower of two
    assert typical_record(record, torch.tensor([0, 1, 0, 1, 2])) == 3
    assert typical_record(record, torch.zeros(5).int()).isnan()


def test_masks_by_hand():
    record = torch.tensor([-0.2, -1.0, -1.0001, 0.5, math.nan])
    assert keep_by_record(record, -1.0).tolist() == [True, True, False, True, True]
    assert keep_by_record(record, torch.tensor(0.1)).tolist() == [False, False, False, True, True]
    assert keep_by_record(record, -math.inf).all()


def test_weighted_mean_by_hand():
    losses = torch.tensor([1.0, 2.0, math.inf], requires_grad=True)
    mean = weighted_mean(losses, torch.tensor([1.0, 0.5, 0.0]))
    mean.backward()
    assert_close(mean.item(), 4 / 3)
    assert_close(losses.grad, torch.tensor([2 / 3, 1 / 3, 0]))
    assert weighted_mean(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5]), divisor=4).item() == 0.5
    assert not weighted_mean(torch.tensor([1.0, math.inf]), torch.tensor([1.0, 0.5])).isfinite()  # stays visible
    half = weighted_mean(torch.full((4096,), 100.0, dtype=torch.float16), torch.ones(4096))
    assert (half.item(), half.dtype) == (100, torch.float16)
    nothing = torch.ones(2, requires_grad=True)
    weighted_mean(nothing, torch.zeros(2)).backward()
    assert nothing.grad.tolist() == [0, 0]


def test_no_gradient_and_no_wait():
    assert not standardized_losses(
        torch.rand(3, requires_grad=True), torch.zeros(3).int(), LogLossStatistics.empty(1)
    ).requires_grad
    with FakeTensorMode():  # tensors without values: raises when one is asked for, or when devices are mixed
        losses, index = torch.rand(8, device="cuda").half(), torch.randint(9, (8,), device="cuda")
        statistics = LogLossStatistics.empty(9, device="cuda")
        statistics = update_log_loss_statistics(statistics, losses, index, 0.9)
        scores = standardized_losses(losses, index, statistics)
        record, seen = torch.zeros(9, device="cuda"), torch.ones(9, device="cuda").int()
        found = update_record(record, index, scores, 0.8)
        weights = update_log_weights(torch.zeros(9, device="cuda"), index, found, typical_record(record, seen), 0.03)
        assert weighted_mean(losses, weights).device == keep_by_record(found, -1.0).device == losses.device


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: update_record(torch.zeros(3), torch.zeros(2).long(), torch.zeros(3), 0.8), ValueError, "`index` expe"),
        (lambda: weighted_mean(torch.zeros(3), torch.zeros(2)), ValueError, r"`weights` expected .* \(3,\), but got"),
        (lambda: standardized_losses(torch.ones(2), torch.ones(2), LogLossStatistics.empty(2)), TypeError, "integers"),
        (lambda: update_record(torch.zeros(3), torch.tensor([3]), torch.zeros(1), 0.8), IndexError, "out of range"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
