"""Any training loader, by shards: each takes its own samples, in the loader's own order."""

import os
import random
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_iet import ShardedDataModule
from lightning_iet.data.samples import IgnoreFirstSigterm, WithIndex
from lightning_iet.data.shard_sampler import RestrictedBatchSampler, ShardPlan
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.random import seed_rng

SIZE = 22


class Dicts(Dataset):
    """Samples that are dicts, of varying sizes."""

    def __init__(self, start=0, size=SIZE):
        self.start, self.size = start, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"number": self.start + index, "latent": torch.full((2,), index, dtype=torch.bfloat16)}


def sharded(num_shards=2, *, plan=None, dataset=None, **kwargs):
    batching = {} if "batch_sampler" in kwargs else {"batch_size": 4}
    loader = DataLoader(Dicts() if dataset is None else dataset, **(batching | kwargs))
    data = ShardedDataModule.from_loader(loader, num_shards=num_shards)
    data.plan = None if plan is None else ShardPlan(**({"num_shards": num_shards, "seed": 5} | plan))
    return data.train_dataloader()


def batches(loader, epoch=0):
    """Samples of each batch by shard."""
    loader.sampler.set_epoch(epoch)
    seen = {}
    for batch in loader.sampler:
        seen.setdefault(batch.shard, []).append(batch.indices)
    return seen


def samples(loader, epoch=0):
    return {shard: [i for batch in of_shard for i in batch] for shard, of_shard in batches(loader, epoch).items()}


# --- samplers ---------------------------------------------------------------------------------------------------------


class Odd(Sampler):
    """The odd samples in an order of each epoch, drawn by a generator of its own."""

    def __init__(self, kind):
        self.epoch, self.kind = 0, kind
        self.python, self.numpy, self.torch = random.Random(3), np.random.default_rng(3), torch.Generator()
        self.legacy = np.random.RandomState(3)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return SIZE // 2

    def __iter__(self):
        order = list(range(1, SIZE, 2))
        if self.kind == "python":
            self.python.shuffle(order)
        elif self.kind == "numpy":
            self.numpy.shuffle(order)
        elif self.kind == "legacy":
            self.legacy.shuffle(order)
        elif self.kind == "torch":
            order = [order[i] for i in torch.randperm(len(order), generator=self.torch)]
        elif self.kind == "global":
            random.shuffle(order)
        else:
            order = order[self.epoch :] + order[: self.epoch]
        return iter(np.array(order) if self.kind == "numpy" else torch.tensor(order))


@pytest.mark.parametrize("kind", ["python", "numpy", "legacy", "torch", "global", "epoch"])
def test_a_samplers_order_is_restricted_to_each_shard(kind):
    loader = sharded(sampler=Odd(kind))
    shards = [set(shard.tolist()) for shard in loader.sampler.shards]
    assert sorted(set.union(*shards)) == list(range(1, SIZE, 2))
    assert sorted(map(len, shards)) == [5, 6]
    for epoch in (0, 1, 7):
        seen = samples(loader, epoch)
        whole = loader.sampler.restricted.whole(0, epoch)
        assert sorted(whole) == list(range(1, SIZE, 2))
        for shard in range(2):
            assert seen[shard] == [i for i in whole if i in shards[shard]]  # the oracle
    assert samples(loader, 0) != samples(loader, 1)
    assert samples(sharded(sampler=Odd(kind)), 7) == samples(loader, 7)


def test_a_subset_is_what_is_split():
    loader = sharded(sampler=SubsetRandomSampler([3, 1, 4, 15, 9, 2, 6]))
    assert sorted(i for shard in samples(loader).values() for i in shard) == [1, 2, 3, 4, 6, 9, 15]
    assert sorted(len(shard) for shard in samples(loader).values()) == [3, 4]


def test_a_fixed_multiset_is_kept():
    class Twice(Odd):
        def __len__(self):
            return 2 * super().__len__()

        def __iter__(self):
            return iter([*super().__iter__(), *super().__iter__()])

    seen = samples(sharded(sampler=Twice("torch")))
    assert sorted(i for shard in seen.values() for i in shard) == sorted([*range(1, SIZE, 2)] * 2)
    assert not set(seen[0]) & set(seen[1])


def test_weighted_draws_are_the_samplers_distribution_given_the_shard():
    weights = torch.tensor([0.0, 1, 2, 5] * 5 + [0.0, 3])
    loader = sharded(sampler=WeightedRandomSampler(weights, 400), batch_size=10)
    shards = loader.sampler.shards
    assert sorted(torch.cat(shards).tolist()) == list(range(SIZE))
    counts = torch.zeros(SIZE)
    for epoch in range(20):
        for shard, seen in samples(loader, epoch).items():
            assert len(seen) == 200
            assert set(seen) <= set(shards[shard].tolist())
            counts += torch.tensor(seen).bincount(minlength=SIZE)
    for shard in shards:
        expected = 4000 * weights[shard] / weights[shard].sum()
        assert ((counts[shard] - expected).abs() <= 5 * expected.sqrt()).all()  # five standard deviations


@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(range(SIZE), replacement=True, num_samples=30),
        RandomSampler(range(SIZE), num_samples=9),
        WeightedRandomSampler([1.0] * SIZE, 9, replacement=False),
    ],
    ids=["replacement", "a few", "weighted, without replacement"],
)
def test_random_subsets_give_every_shard_an_equal_part(sampler):
    loader = sharded(sampler=sampler, batch_size=2)
    for epoch in range(30):
        seen = samples(loader, epoch)
        total = len(sampler)
        assert [len(seen[shard]) for shard in range(2)] == [total - total // 2, total // 2]
        if total == 9:  # without replacement
            assert all(len(set(shard)) == len(shard) for shard in seen.values())
    assert samples(loader, 0) != samples(loader, 1)


def test_ordinary_samplers_are_recognised():
    plain = samples(sharded(shuffle=True))
    assert samples(sharded(batch_sampler=BatchSampler(RandomSampler(range(SIZE)), 4, drop_last=False))) == plain
    distributed = DistributedSampler(range(SIZE), num_replicas=2, rank=1, shuffle=True)
    assert samples(sharded(sampler=distributed)) == plain
    stored = DistributedSampler(range(SIZE), num_replicas=2, rank=1, shuffle=False)
    assert samples(sharded(sampler=stored)) == samples(sharded())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(SIZE))


class Unsized(Sampler):
    def __iter__(self):
        return iter(range(SIZE))


class Pairs(Odd):
    def __iter__(self):
        return iter([(i, 64) for i in super().__iter__()])


class Own(DataLoader):
    def __iter__(self):
        return iter([])


def test_orders_that_cannot_be_restricted_are_refused():
    for sampler, message in [
        (Unsized(), r"a sampler with a length, but got Unsized. Give it a `__len__`"),
        (Pairs("torch"), r"a sampler of indices, but got Pairs, which yields tuple. Let the data set add"),
    ]:
        with pytest.raises(TypeError, match=message):
            sharded(sampler=sampler)
    with pytest.raises(TypeError, match="Own, which makes its batches itself"):
        ShardedDataModule.from_loader(Own(Dicts()), num_shards=2).train_dataloader()
    weights = torch.zeros(SIZE)
    weights[sharded().sampler.shards[0][:2]] = torch.tensor([1.0, 2.0])  # none of the other shard's
    with pytest.raises(ValueError, match=r"expected a sampler that yields \[5, 5\] samples.*100 epochs hold"):
        samples(sharded(sampler=WeightedRandomSampler(weights, 10)))


def test_a_sampler_that_remembers_its_epochs_is_refused():
    class Remembering(Sampler):
        def __init__(self):
            self.asked = 0

        def __len__(self):
            return SIZE

        def __iter__(self):
            self.asked += 1
            return iter([(i + self.asked) % SIZE for i in range(SIZE)])

    with pytest.raises(TypeError, match=r"Remembering, which remembers its epochs. Give it a `set_epoch"):
        sharded(sampler=Remembering())


# --- batch samplers ---------------------------------------------------------------------------------------------------


class Grouped(Sampler):
    """Batches of samples that leave the same remainder, made of what a sampler yields (as by aspect ratio)."""

    def __init__(self, sampler, batch_size=2, groups=3):
        self.sampler, self.batch_size, self.groups = sampler, batch_size, groups

    def __len__(self):
        return sum(-(-len(range(g, SIZE, self.groups)) // self.batch_size) for g in range(self.groups))

    def __iter__(self):
        buckets = [[] for _ in range(self.groups)]
        for index in self.sampler:
            bucket = buckets[index % self.groups]
            bucket.append(index)
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()
        yield from [bucket for bucket in buckets if bucket]


class Whole(Sampler):
    """Batches of neighbours out of the whole data set, in random order, with no sampler inside."""

    def __len__(self):
        return SIZE // 11 * 2 + 1

    def __iter__(self):
        order = torch.randperm(SIZE)
        return iter([order[i : i + 5] for i in range(0, SIZE, 5)])


def test_a_grouping_batch_sampler_groups_each_shards_samples():
    loader = sharded(batch_sampler=Grouped(RandomSampler(range(SIZE))))
    assert isinstance(loader.sampler, RestrictedBatchSampler)
    for epoch in range(3):
        seen = batches(loader, epoch)
        for shard, of_shard in seen.items():
            mine = set(loader.sampler.shards[shard].tolist())
            assert {i for batch in of_shard for i in batch} <= mine
            assert all(len({i % 3 for i in batch}) == 1 for batch in of_shard)
            assert max(map(len, of_shard)) == 2
            order = [i for i in loader.sampler.inner.whole(0, epoch) if i in mine]
            assert of_shard == list(Grouped(order))[: len(of_shard)]  # the oracle
        assert len(seen[0]) == len(seen[1]) == len(loader) // 2
    assert batches(loader, 0) != batches(loader, 1)


def test_of_any_other_batch_sampler_a_shard_takes_its_part_of_each_batch():
    loader = sharded(batch_sampler=Whole())
    for epoch in range(3):
        whole = loader.sampler.whole(0, epoch)
        for shard, of_shard in batches(loader, epoch).items():
            mine = set(loader.sampler.shards[shard].tolist())
            expected = [part for part in ([i for i in batch if i in mine] for batch in whole) if part]
            assert of_shard[: len(expected)] == expected[: len(of_shard)]
            assert all(set(batch) <= mine for batch in of_shard)
    with pytest.raises(ValueError, match="with 8 batches for every shard, but got Whole with"):
        sharded(batch_sampler=Whole(), plan={"multiple_of": 8})


@pytest.mark.parametrize(
    "kwargs",
    [
        {"sampler": Odd("torch")},
        {"sampler": WeightedRandomSampler([1.0, 2.0] * 11, 16)},
        {"batch_sampler": Grouped(RandomSampler(range(SIZE)))},
        {"batch_sampler": Whole()},
    ],
    ids=["sampler", "weights", "grouped", "batches"],
)
def test_any_order_is_the_same_on_any_number_of_processes_and_after_a_cut(kwargs):
    alone = sharded(plan={}, **kwargs)
    both = [sharded(plan={"num_processes": 2, "rank": rank}, **kwargs) for rank in range(2)]
    for epoch in (0, 3):
        together = {shard: seen for loader in both for shard, seen in batches(loader, epoch).items()}
        assert together == batches(alone, epoch)
    cut = sharded(plan={"epoch": 3, "done": (2, 1)}, **kwargs)
    left = {shard: seen[done:] for (shard, seen), done in zip(batches(alone, 3).items(), (2, 1), strict=True)}
    assert batches(cut, 3) == {shard: seen for shard, seen in left.items() if seen}


@pytest.mark.parametrize("kwargs", [{"sampler": Odd("torch"), "batch_size": 2}, {"batch_sampler": Whole()}])
def test_replicas_share_a_shards_batches_out(kwargs):
    alone = sharded(plan={}, **kwargs)
    replicas = [sharded(plan={"num_processes": 4, "rank": rank}, **kwargs) for rank in range(4)]
    seen = [batches(loader) for loader in replicas]
    assert [list(one) for one in seen] == [[0], [0], [1], [1]]
    assert len({len(of_shard) for one in seen for of_shard in one.values()}) == 1
    for shard in range(2):
        parts = [[i for batch in one[shard] for i in batch] for one in seen if shard in one]
        assert not set(parts[0]) & set(parts[1])
        assert set(parts[0]) | set(parts[1]) <= set(alone.sampler.shards[shard].tolist())


# --- what a loader makes of its samples -------------------------------------------------------------------------------


def test_a_loader_without_batching():
    loader = sharded(num_shards=3, batch_size=None, shuffle=True)
    seen = [sample["number"] for sample in loader]
    assert len(seen) == 21 == len(set(seen))  # of shards of 8, 7 and 7 samples, seven each
    assert all(sample["latent"].shape == (2,) for sample in loader)


def test_concatenated_data_sets():
    loader = sharded(dataset=ConcatDataset([Dicts(size=10), Dicts(100, 12)]), shuffle=True)
    seen = [int(number) for batch in loader for number in batch["number"]]
    assert sorted(seen) == [*range(10), *range(100, 112)]


def flip(samples):
    return torch.tensor([sample["number"] for sample in samples]), torch.rand(())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_collating_draws_depends_on_the_batch_and_the_epoch_alone(num_workers):
    def drawn(**plan):
        loader = sharded(plan=plan, collate_fn=flip, num_workers=num_workers, shuffle=True)
        return {tuple(numbers.tolist()): float(x) for numbers, x in loader}

    alone = drawn()
    assert drawn(num_processes=2, rank=0) | drawn(num_processes=2, rank=1) == alone
    assert len(set(alone.values())) == len(alone)


# --- sample identity --------------------------------------------------------------------------------------------------


def test_an_index_is_added_to_samples_of_any_kind():
    tensors = torch.arange(4.0)
    assert [WithIndex(data)[2] for data in (tensors, [1, 2, 3], [[1], [2], [3]])] == [(tensors[2], 2), (3, 2), (3, 2)]
    named = WithIndex(Dicts(), key="place")
    assert named[3]["place"] == 3
    assert len(named) == SIZE
    assert named.start == 0
    with pytest.raises(KeyError, match="no entry of a sample has, but got 'number'"):
        WithIndex(Dicts(), key="number")[0]
    with pytest.raises(TypeError, match="a map-style data set, but got the stream"):
        WithIndex(Stream())


def test_indices_survive_shards_shuffling_and_workers():
    loader = sharded(dataset=WithIndex(Dicts(100)), shuffle=True, num_workers=2)
    for batch in loader:
        assert (batch["number"] == batch["index"] + 100).all()


def test_samples_are_read_with_the_seeds_of_the_sample():
    class Drawing(Dicts):
        def __getitem__(self, index):
            return index, torch.rand(())

    for numbers, drawn in sharded(dataset=Drawing(), plan={}, sampler=Odd("global")):
        for index, x in zip(numbers.tolist(), drawn, strict=True):
            seed_rng(derive_seed(5, 0, index), devices=False)
            assert x == torch.rand(())


class Nervous(torch.utils.data.Dataset):
    """Sends its worker a number of signals before it yields a sample."""

    def __init__(self, signals):
        self.signals = signals

    def __len__(self):
        return 2

    def __getitem__(self, index):
        for _ in range(self.signals if index == 0 else 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return index


def remember(worker):
    torch.utils.data.get_worker_info().dataset.prepared = True


def read(signals):
    return [int(x) for x in DataLoader(Nervous(signals), num_workers=1, worker_init_fn=IgnoreFirstSigterm(remember))]


def test_one_signal_is_waited_out():
    assert read(1) == [0, 1]


def test_the_second_ends_the_worker():
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed"):
        read(2)
