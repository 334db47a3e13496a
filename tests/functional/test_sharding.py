import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional.sharding import cut_batches, hosted_shards, partition, steps_per_epoch, walk


@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 3))
def test_iid_shards_hold_each_sample_once_in_nearly_equal_sizes(num_samples, num_shards, seed):
    if num_shards > num_samples:
        with pytest.raises(ValueError, match=f"at most one shard per sample \\({num_samples}\\), but got {num_shards}"):
            partition(num_samples, num_shards, seed=seed)
        return
    shards = partition(num_samples, num_shards, seed=seed)
    assert sorted(i for shard in shards for i in shard.tolist()) == list(range(num_samples))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(st.lists(st.integers(4, 9), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 3))
def test_stratified_shards_hold_each_class_in_nearly_equal_numbers(class_sizes, num_shards, seed):
    labels = [label for label, size in enumerate(class_sizes) for _ in range(size)]
    shards = partition(len(labels), num_shards, labels=labels, seed=seed)
    assert sorted(i for shard in shards for i in shard.tolist()) == list(range(len(labels)))
    for label in range(len(class_sizes)):
        counts = [sum(labels[i] == label for i in shard.tolist()) for shard in shards]
        assert max(counts) - min(counts) <= 1
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_the_split_depends_on_the_seed_alone():
    first, again, other = (partition(100, 4, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_class_with_fewer_samples_than_shards_is_named():
    with pytest.raises(ValueError, match=r"at most 2 for a stratified split, since class 7 has only that many.*iid"):
        partition(5, 3, labels=[5, 5, 5, 7, 7])
    with pytest.raises(ValueError, match=r"one label per sample, shape \(5,\), but got \(2,\)"):
        partition(5, 1, labels=[1, 2])
    with pytest.raises(ValueError, match="`num_shards` expected an integer ≥ 1"):
        partition(5, 0)


@given(
    st.lists(st.integers(5, 60), min_size=1, max_size=5),
    st.integers(1, 20),
    st.booleans(),
    st.integers(1, 3),
)
def test_every_shard_gets_the_same_number_of_batches(sizes, batch_size, drop_last, multiple_of):
    try:
        steps = steps_per_epoch(sizes, batch_size, drop_last=drop_last, multiple_of=multiple_of)
    except ValueError:
        return
    assert steps % multiple_of == 0
    for size in sizes:
        batches = cut_batches(torch.arange(size), steps, batch_size=batch_size, drop_last=drop_last)
        assert len(batches) == steps
        seen = [i for batch in batches for i in batch.tolist()]
        if drop_last:
            assert {len(batch) for batch in batches} == {batch_size}
            assert seen == list(range(steps * batch_size))
        else:
            assert seen == list(range(size))
            assert min(map(len, batches)) >= 1
            assert max(map(len, batches)) <= batch_size


def test_steps_are_refused_when_a_shard_is_too_small():
    with pytest.raises(ValueError, match="between 1 and 2 batches"):
        steps_per_epoch([2, 9], 3)
    with pytest.raises(ValueError, match="or drop_last=False"):
        steps_per_epoch([5, 5], 6, drop_last=True)
    with pytest.raises(ValueError, match="`batch_size` expected an integer ≥ 1"):
        steps_per_epoch([5], 0)
    assert steps_per_epoch([40, 40], 4, limit=3) == 3
    assert steps_per_epoch([40, 40], 4, limit=3, multiple_of=2) == 2


def test_processes_host_neighbours_and_must_divide_the_shards():
    assert [list(hosted_shards(4, 2, rank)) for rank in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match=r"multiple or a divisor of the 3 processes, but got 4\. Use num_shards=6"):
        hosted_shards(4, 3, 0)


@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 3), st.none() | st.integers(1, 9))
def test_a_walk_takes_every_step_once_and_shards_meet_at_averagings(num_shards, steps, epoch, round_steps):
    shards = list(range(10, 10 + num_shards))
    path = walk(shards, steps, epoch=epoch, round_steps=round_steps)
    assert sorted((s.shard, s.step) for s in path) == [(k, s) for k in shards for s in range(steps)]
    progress = dict.fromkeys(shards, 0)
    for i, at in enumerate(path):
        assert progress[at.shard] == at.step
        assert at.first == (i == 0 or path[i - 1].shard != at.shard or path[i - 1].averaging)
        progress[at.shard] += 1
        due = bool(round_steps) and (epoch * steps + at.step + 1) % round_steps == 0
        everybody_there = set(progress.values()) == {at.step + 1}
        assert at.averaging == (due and everybody_there)
