"""Iterable data by shards: sample i of the stream goes to shard i mod K, whoever reads it."""

import random

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_iet import ShardedDataModule
from lightning_iet.data.shard_sampler import ShardPlan


class Stream(IterableDataset):
    """Numbers; splits itself among workers, as most do."""

    def __init__(self, length=20, told=None):
        self.length, self.told, self.passes = length, told, 0

    def __len__(self):
        if self.told is None:
            raise TypeError
        return self.told

    def __iter__(self):
        self.passes += 1
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return iter(range(start, self.length, step))


class Shuffled(Stream):
    """Through a buffer, with the global generators."""

    def __iter__(self):
        buffer = []
        for number in super().__iter__():
            buffer.append(number)
            if len(buffer) == 5:
                yield buffer.pop(random.randrange(5))
        random.shuffle(buffer)
        yield from buffer


def sharded(stream=None, num_shards=2, *, plan=None, num_samples=20, **kwargs):
    loader = DataLoader(Stream() if stream is None else stream, **({"batch_size": 3} | kwargs))
    data = ShardedDataModule.from_loader(loader, num_shards=num_shards, num_samples=num_samples)
    data.plan = None if plan is None else ShardPlan(**({"num_shards": num_shards, "seed": 5} | plan))
    return data.train_dataloader()


def read(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return [batch.tolist() for batch in loader if batch is not None]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_every_shard_reads_its_own_of_the_stream(num_workers):
    loader = sharded(num_workers=num_workers)
    for epoch in range(2):
        seen = read(loader, epoch)
        half = len(seen) // 2
        assert [i for batch in seen[:half] for i in batch] == list(range(0, 20, 2))
        assert [i for batch in seen[half:] for i in batch] == list(range(1, 20, 2))
        assert max(map(len, seen)) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("round_steps", [None, 2])
def test_processes_and_cuts_change_nothing(num_workers, round_steps):
    def reading(**plan):
        return read(sharded(plan={"round_steps": round_steps} | plan, num_workers=num_workers), plan.get("epoch", 0))

    alone = reading()
    assert sorted(reading(num_processes=2, rank=0) + reading(num_processes=2, rank=1)) == sorted(alone)
    rest = reading(epoch=3, done=(2, 2))
    assert sorted(rest) == sorted(batch for batch in alone if batch[0] >= 12)
    replicas = [reading(num_processes=4, rank=rank) for rank in range(4)]
    assert sorted(i for one in replicas for batch in one for i in batch) == list(range(20))


def test_a_shuffled_stream_keeps_its_shards():
    loader = sharded(Shuffled(), num_workers=0)
    first = read(loader)
    order = [i for batch in first for i in batch]
    assert sorted(order) == list(range(20))
    assert order != sorted(order)
    torch.rand(3)
    random.random()
    assert read(loader, 1) == first  # sample i is the same sample in every epoch


def test_one_pass_for_each_shard():
    stream = Stream()
    loader = sharded(stream, 2)
    before = stream.passes
    read(loader)
    assert stream.passes == before + 2


def test_a_stream_that_yields_batches():
    class Batches(Stream):
        def __iter__(self):
            return (torch.tensor([number, number]) for number in super().__iter__())

    assert read(sharded(Batches(), batch_size=None, num_samples=5)) == [[0, 0], [2, 2], [1, 1], [3, 3]]


def test_lengths():
    assert len(read(sharded(Stream(told=12), num_samples=None))) == 4
    limited = read(sharded(num_samples=None, plan={"limit": 2}))
    assert limited == [[0, 2, 4], [6, 8, 10], [1, 3, 5], [7, 9, 11]]
    with pytest.raises(ValueError, match=r"length of the stream Stream, which does not tell it, but got None. Give it"):
        sharded(num_samples=None)
    with pytest.raises(ValueError, match="it ended after 20 samples, before sample"):
        read(sharded(num_samples=30))


def test_a_stream_that_changes_is_refused():
    class Changing(Stream):
        def __iter__(self):
            self.length += 1
            return iter(range(self.length, 0, -1))

    with pytest.raises(ValueError, match="the same samples in every pass, but got Changing"):
        sharded(Changing())
