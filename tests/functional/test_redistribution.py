"""The exchange of samples against a loop over shards with sorted lists."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_iet.functional.redistribution import is_exchange_epoch, redistribute


def naive(shards, skips, fraction, min_skips=1, labels=None):
    """IET_AGC_PLUS P2, written out: the new shards as sorted lists."""
    labels = [0] * len(skips) if labels is None else labels
    leaving = [[] for _ in shards]
    for label in sorted(set(labels)):
        most_skipped = []
        numbers = []
        for shard in shards:
            members = [i for i in shard if labels[i] == label]
            eligible = sorted((i for i in members if skips[i] >= min_skips), key=lambda i: (-skips[i], i))
            most_skipped.append(eligible)
            numbers.append(min(math.floor(fraction * len(members)), len(eligible)))
        for eligible, found in zip(most_skipped, leaving, strict=True):
            found += eligible[: min(numbers)]
    return [sorted((set(shard) - set(leaving[c])) | set(leaving[c - 1])) for c, shard in enumerate(shards)], leaving


@st.composite
def splits(draw):
    """Disjoint shards that need not be equal nor sorted, with few numbers of skips, so that most of them are ties."""
    num_samples = draw(st.integers(2, 40))
    num_shards = draw(st.integers(2, 6))
    owners = draw(st.lists(st.integers(-1, num_shards - 1), min_size=num_samples, max_size=num_samples))
    order = draw(st.permutations(range(num_samples)))
    shards = [[i for i in order if owners[i] == shard] for shard in range(num_shards)]
    skips = draw(st.lists(st.integers(0, 3), min_size=num_samples, max_size=num_samples))
    labels = draw(st.none() | st.lists(st.integers(0, 2), min_size=num_samples, max_size=num_samples))
    return shards, skips, labels


def exchange(shards, skips, fraction, min_skips=1, labels=None, **kwargs):
    return redistribute(
        [torch.tensor(shard, dtype=torch.long) for shard in shards],
        torch.tensor(skips, dtype=torch.int32),
        float(fraction),
        min_skips=min_skips,
        labels=None if labels is None else torch.tensor(labels),
        **kwargs,
    )


@given(splits(), st.sampled_from([Fraction(0), Fraction(1, 4), Fraction(1, 3), Fraction(1, 2)]), st.integers(0, 3))
@example(([[0, 1], [2, 3]], [5, 5, 5, 5], None), Fraction(1, 2), 1)
def test_equals_the_loop(split, fraction, min_skips):
    shards, skips, labels = split
    expected, leaving = naive(shards, skips, fraction, min_skips, labels)
    found = exchange(shards, skips, fraction, min_skips, labels)
    assert [shard.tolist() for shard in found.shards] == expected
    assert [set(moved.tolist()) for moved in found.moved] == [set(samples) for samples in leaving]
    # What does not depend on how it is computed:
    assert [len(shard) for shard in found.shards] == [len(shard) for shard in shards]
    together = torch.cat(found.shards)
    assert sorted(together.tolist()) == sorted(i for shard in shards for i in shard)
    if labels is not None:
        for before, after in zip(shards, found.shards, strict=True):
            assert sorted(labels[i] for i in before) == sorted(labels[i] for i in after.tolist())
    if fraction == 0 or max(skips) < min_skips:
        assert [shard.tolist() for shard in found.shards] == [sorted(shard) for shard in shards]


@given(splits(), st.integers(0, 9))
def test_at_random_as_many_move(split, seed):
    shards, skips, labels = split
    by_skips, at_random = (exchange(shards, skips, 0.5, labels=labels, random_seed=s) for s in (None, seed))
    again = exchange([shard[::-1] for shard in shards], skips, 0.5, labels=labels, random_seed=seed)
    for a, b, c in zip(by_skips.moved, at_random.moved, again.moved, strict=True):
        assert len(a) == len(b)
        assert b.tolist() == c.tolist()  # whatever order a shard is given in
        if labels is not None:
            assert sorted(labels[i] for i in a.tolist()) == sorted(labels[i] for i in b.tolist())


def test_three_exchanges_bring_the_skipped_ones_around_a_ring_of_three():
    start = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), torch.tensor([6, 7, 8])]
    skips = torch.tensor([9, 0, 0, 9, 0, 0, 9, 0, 0])  # samples 0, 3 and 6, always
    expected = [[[1, 2, 6], [0, 4, 5], [3, 7, 8]], [[1, 2, 3], [4, 5, 6], [0, 7, 8]], [[0, 1, 2], [3, 4, 5], [6, 7, 8]]]
    shards = start
    for after in expected:
        shards = redistribute(shards, skips, 1 / 3).shards
        assert [shard.tolist() for shard in shards] == after


def test_two_shards_swap():
    found = exchange([[0, 1, 2, 3], [4, 5, 6, 7]], [0, 0, 7, 8, 1, 0, 9, 0], 0.5)
    assert [moved.tolist() for moved in found.moved] == [[3, 2], [6, 4]]
    assert [shard.tolist() for shard in found.shards] == [[0, 1, 4, 6], [2, 3, 5, 7]]


def test_ties_move_the_smallest_indices():
    found = exchange([[7, 1, 5, 3], [0, 2, 4, 6]], [4] * 8, 0.5)
    assert [moved.tolist() for moved in found.moved] == [[1, 3], [0, 2]]


def test_a_fraction_is_what_the_user_wrote():
    shards, skips = [list(range(100)), list(range(100, 200))], [1] * 200
    assert math.floor(0.29 * 100) == 28  # in floating point
    assert len(exchange(shards, skips, 0.29).moved[0]) == 29


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fraction": 0.6}, r"Argument `fraction` expected a number in \[0, 0.5\], but got 0.6. 0.25 was published"),
        ({"fraction": -0.1}, r"Argument `fraction` .* but got -0.1"),
        ({"fraction": float("nan")}, r"Argument `fraction` .* but got nan"),
        ({"min_skips": -1}, "Argument `min_skips` expected an integer ≥ 0, but got -1"),
        ({"shards": [[0, 1]]}, "Argument `fraction` expected 0 with 1 shard, but got 0.25.*--averaging.num_shards"),
        ({"skips": [1, 1]}, r"Argument `skips` expected .* n ≥ 4, but got \(2,\)"),
        ({"labels": [1]}, r"Argument `labels` expected .* n ≥ 4, but got \(1,\)"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        exchange(**({"shards": [[0, 1], [2, 3]], "skips": [1] * 4, "fraction": 0.25} | kwargs))


@given(st.integers(1, 9), st.sampled_from(["half_round", "round"]))
def test_epochs_of_rounds_by_epochs(length, at):
    due = [is_exchange_epoch(epoch, at=at, round_epochs=length) for epoch in range(40)]
    after = math.ceil(length / 2) if at == "half_round" else length
    assert due == [epoch % length == after - 1 for epoch in range(40)]


@given(st.integers(1, 30), st.integers(1, 12), st.sampled_from(["half_round", "round"]))
def test_epochs_of_rounds_by_steps(length, epoch_steps, at):
    """Walk step by step: an exchange that comes due waits for the end of its epoch."""
    due, waiting = [], False
    for epoch in range(30):
        for step in range(epoch * epoch_steps + 1, (epoch + 1) * epoch_steps + 1):
            place = 2 * step % (2 * length)
            previous = 2 * (step - 1) % (2 * length)
            ends = place == 0
            passes_middle = previous < length <= (place or 2 * length)
            waiting |= ends if at == "round" else passes_middle
        due.append(waiting)
        waiting = False
    found = [is_exchange_epoch(e, at=at, round_steps=length, epoch_steps=epoch_steps) for e in range(30)]
    assert found == due


def test_a_round_has_a_length():
    with pytest.raises(ValueError, match="Argument `round_epochs` expected a number, or `round_steps`"):
        is_exchange_epoch(0, round_steps=3)
