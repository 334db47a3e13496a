"""Counts by sample against a dictionary."""

import math
from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from lightning_iet.callbacks.anti_gradient_control.sample_record import SampleCounts

ROWS = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), max_size=10)


@given(st.lists(ROWS, max_size=6), st.integers(0, 6))
def test_equals_dictionaries(batches, exchange_before):
    counts, since = SampleCounts(5), [Counter(), Counter()]
    in_all = [Counter(), Counter()]
    for number, batch in enumerate(batches):
        if number == 2:
            counts.share(1)
        if number == exchange_before:
            counts.end_exchange()
            since = [Counter(), Counter()]
        index, keep, exempt = (torch.tensor([row[i] for row in batch]) for i in range(3))
        counts.update(index.long(), keep=keep.bool(), exempt=exempt.bool())
        for i, kept, is_exempt in batch:
            for seen, skipped in (since, in_all):
                seen[i] += not is_exempt
                skipped[i] += not is_exempt and not kept
    found = [*counts.since_exchange(), counts.seen, counts.skipped]
    for values, expected in zip(found, (*since, *in_all), strict=True):
        assert values.tolist() == [expected[i] for i in range(5)]
    rates = [in_all[1][i] / in_all[0][i] if in_all[0][i] else math.nan for i in range(5)]
    assert_close(counts.skip_rate(), torch.tensor(rates), equal_nan=True)
    known = sorted((rate for rate in rates if rate == rate), reverse=True)
    assert_close(counts.most_skipped(0.5).item(), _mean(known[: max(1, round(0.5 * len(known)))]), equal_nan=True)


def _mean(values):
    return sum(values) / len(values) if values else math.nan


def test_an_index_out_of_range_is_told_and_counts_nowhere():
    counts = SampleCounts(2)
    counts.update(torch.tensor([-1, 2, 1], dtype=torch.int32), keep=torch.zeros(3).bool())
    assert counts.out_of_range == 2
    assert counts.skipped.tolist() == [0, 1]


def test_no_wait():
    with FakeTensorMode():  # tensors without values: raises when one is asked for, or when devices are mixed
        counts = SampleCounts(9).to("cuda")
        counts.update(torch.randint(9, (4,), device="cuda"), keep=torch.rand(4, device="cuda") > 0.5)
        assert counts.own.device.type == "cuda"
