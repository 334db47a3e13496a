"""The order in which a process reads the samples of its shards: shuffled, as another sampler says, or of a stream."""

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, IterableDataset, Sampler
from torch.utils.data._utils import worker

from lightning_iet.data.samples import FINGERPRINTED, fingerprint_of_samples
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.functional.sharding import (
    ShardStep,
    cut_batches,
    hosted_shards,
    num_replicas,
    replica_part,
    resume,
    steps_per_epoch,
    to_assignment,
    walk,
)
from lightning_iet.utilities.lightning import patched_attribute
from lightning_iet.utilities.random import get_rng_state, isolated_rng, seed_rng, set_rng_state


@dataclass(frozen=True)
class ShardPlan:
    """How a run distributes its shards; the averaging callback sets it before the first batch."""

    num_shards: int
    """K, a property of the run."""
    num_processes: int = 1
    """W, a property of the machine; divides K, or is a multiple of it."""
    rank: int = 0
    """This process."""
    seed: int = 0
    """Seed of the run, the same on every process."""
    round_steps: int | None = None
    """Batches of each shard between two averagings; None = rounds are whole epochs."""
    multiple_of: int = 1
    """Of accumulated gradients; every shard's number of batches is a multiple of this."""
    limit: int | None = None
    """At most this many batches of each shard in an epoch."""
    epoch: int = 0
    """The epoch in which the run (re)starts."""
    done: tuple[int, ...] = ()
    """Batches that each shard has taken in that epoch before it was cut; empty = none."""


@dataclass(frozen=True)
class ShardBatch:
    """The samples of one step, as the sampler hands them to the data set (and to its workers)."""

    shard: int | None
    """The shard that takes the step; None in a step in which this process waits for others."""
    epoch: int
    seed: int
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)


class ShardSampler(DistributedSampler[ShardBatch]):
    """Yields whole batches, each from one shard; a process takes its shards one after the other.

    To be used as ``DataLoader(SeededSamples(dataset), sampler=ShardSampler(…), batch_size=None, collate_fn=…)``, the
    way in which PyTorch takes samplers of batches. It subclasses ``DistributedSampler``, so that Lightning leaves it
    alone under DDP and tells it the epoch. The order of samples derives from (seed, shard, epoch), never from the rank.

    Args:
        shards: One index tensor per shard of the run (all K of them), from
            :func:`~lightning_iet.functional.sharding.partition`.
        batch_size: Largest number of samples in a batch of this process; n replicas of a shard take n such batches in
            a step.
        plan: How the run distributes its shards; by default all of them in this process.
        shuffle: Whether each shard's samples are shuffled in each epoch.
        drop_last: Only full batches.

    Raises:
        ValueError: If neither K nor the process count divides the other, or a shard is too small for its share of
            batches.

    Example:
        >>> sampler = ShardSampler([torch.tensor([0, 1, 4]), torch.tensor([2, 3])], batch_size=2, shuffle=False)
        >>> [(batch.shard, batch.indices) for batch in sampler]
        [(0, [0, 1]), (0, [4]), (1, [2]), (1, [3])]
    """

    def __init__(
        self,
        shards: Sequence[Tensor],
        batch_size: int,
        *,
        plan: ShardPlan | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.shards = list(shards)
        self.plan = plan or ShardPlan(num_shards=len(self.shards))
        super().__init__(
            range(sum(len(shard) for shard in self.shards)),  # type: ignore[arg-type]
            num_replicas=self.plan.num_processes,
            rank=self.plan.rank,
            shuffle=shuffle,
            seed=self.plan.seed,
            drop_last=drop_last,
        )
        if self.plan.num_shards != len(self.shards):
            raise ValueError(
                f"Argument `num_shards` expected the same value in the data and in the averaging, "
                f"but got {len(self.shards)} and {self.plan.num_shards}."
            )
        self.batch_size = batch_size
        self.identity: dict[str, str] = {}
        # Workers read ahead before Lightning tells the epoch.
        self.epoch = self.plan.epoch
        self.replicas = num_replicas(len(self.shards), self.plan.num_processes)
        self.hosted = hosted_shards(len(self.shards), self.plan.num_processes, self.plan.rank)
        self.steps = self._steps(limit=self.plan.limit)

    def reassign(self, shards: Sequence[Tensor]) -> None:
        """Put other samples into the shards, from the next epoch on; sizes do not change."""
        if [len(shard) for shard in shards] != self.sizes:
            raise ValueError(
                f"Argument `shards` expected shards of {self.sizes} samples, but got"
                f" {[len(shard) for shard in shards]}. Exchange equally many."
            )
        self.shards = list(shards)

    @property
    def sizes(self) -> list[int]:
        """Number of samples of every shard of the run."""
        return [len(shard) for shard in self.shards]

    @property
    def lengths(self) -> list[int]:
        """Number of samples that every shard of the run takes in an epoch."""
        return self.sizes

    def walk(self, epoch: int) -> list[ShardStep]:
        """Return the steps of this process in an epoch, in order; where a run resumes, those left of its epoch.

        A step without a shard waits for processes that have more left; its batch is None.
        """
        processes, plan = range(self.plan.num_processes), self.plan
        hosts = [hosted_shards(plan.num_shards, plan.num_processes, rank) for rank in processes]
        walks = [walk(hosted, self.steps, epoch=epoch, round_steps=plan.round_steps) for hosted in hosts]
        if epoch == plan.epoch and plan.done:
            return resume(walks, plan.done, plan.rank)
        return walks[plan.rank]

    def order(self, shard: int, epoch: int) -> Tensor:
        """Return the samples of a shard in the order of an epoch."""
        indices = self.shards[shard]
        if not self.shuffle:
            return indices
        generator = torch.Generator().manual_seed(derive_seed(self.seed, shard, epoch))
        return indices[torch.randperm(len(indices), generator=generator)]

    def batches(self, shard: int, epoch: int) -> list[list[int]]:
        """Return the batches of a shard in an epoch, which depend on (seed, shard, epoch) and on the replica alone."""
        indices = replica_part(self.order(shard, epoch), self.replicas, self.plan.rank % self.replicas)
        # A limit cuts the epoch short; it does not spread all samples over fewer batches.
        pieces = cut_batches(indices, self._steps(), batch_size=self.batch_size, drop_last=self.drop_last)
        return [piece.tolist() for piece in pieces[: self.steps]]

    def _steps(self, limit: int | None = None) -> int:
        parts = [length // self.replicas for length in self.lengths]
        return steps_per_epoch(
            parts, self.batch_size, drop_last=self.drop_last, multiple_of=self.plan.multiple_of, limit=limit
        )

    def __iter__(self) -> Iterator[ShardBatch]:
        epoch = self.epoch
        batches = {shard: self.batches(shard, epoch) for shard in self.hosted}
        for step in self.walk(epoch):
            indices = [] if step.shard is None else batches[step.shard][step.step]
            yield ShardBatch(step.shard, epoch, self.seed, indices)

    def __len__(self) -> int:
        return self.steps * len(self.hosted)


class SeededSamples(Dataset[list[Any]]):
    """Reads the samples of a batch from a map-style data set, each with generators seeded by (seed, epoch, index).

    Random flips and crops then depend on the sample and the epoch only: not on the worker that reads it, not on the
    process count, and they leave the random numbers of training as they are.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, batch: ShardBatch) -> list[Any]:
        with isolated_rng():
            samples = []
            for index in batch.indices:
                seed_rng(derive_seed(batch.seed, batch.epoch, index), devices=False)
                samples.append(self.dataset[index])
            return samples


# --- in the order of another sampler ----------------------------------------------------------------------------------


class SeededOrder:
    """What a sampler, or a batch sampler, yields in an epoch: the same on every process and after a resume.

    The global random generators, and those that the sampler holds, are seeded by (seed, epoch); its ``set_epoch``, if
    it has one, is called with the epoch.

    Args:
        sampler: Yields indices, and has a length.
        batched: Whether it yields lists of indices.

    Attributes:
        first: The indices of one epoch, in order.
        is_fixed: Whether every epoch holds the same samples, each equally often.

    Raises:
        TypeError: If it has no length, yields anything else, or yields something else for the same seed and epoch.

    Example:
        >>> from torch.utils.data import SubsetRandomSampler
        >>> order = SeededOrder(SubsetRandomSampler([2, 3, 5]))
        >>> order(0, 0) == order(0, 0), sorted(order(0, 1)), order.is_fixed
        (True, [2, 3, 5], True)
    """

    def __init__(self, sampler: Iterable[Any], *, batched: bool = False) -> None:
        self.sampler = sampler
        self.batched = batched
        self.name = type(sampler).__name__
        try:
            self.length = len(sampler)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError) as error:
            raise TypeError(
                f"Argument `datamodule` expected a sampler with a length, but got {self.name}. Give it a `__len__`."
            ) from error
        first, again, other = self(0, 0), self(0, 0), self(0, 1)
        self.first = self._flat(first)
        if first != again:
            raise TypeError(
                f"Argument `datamodule` expected a sampler whose order follows from random generators and `set_epoch`, "
                f"but got {self.name}, which remembers its epochs. Give it a `set_epoch(epoch)` to start from."
            )
        self.is_fixed = sorted(self.first) == sorted(self._flat(other))

    def __call__(self, seed: int, epoch: int, again: int = 0) -> list[Any]:
        """Return the epoch's indices or batches; ``again`` counts further passes of it."""
        number = derive_seed(seed, epoch, again)
        with isolated_rng(seed=number):
            _reseed(self.sampler, number)
            if hasattr(self.sampler, "set_epoch"):
                self.sampler.set_epoch(epoch)
            return [self._plain(entry) for entry in islice(self.sampler, self.length)]

    def support(self, size: int) -> Tensor:
        """Return the samples to split: those that every epoch holds, or all ``size`` of them where epochs differ."""
        return torch.as_tensor(self.first).unique() if self.is_fixed else torch.arange(size)

    def _plain(self, entry: Any) -> Any:
        """Integers of Python, whatever type the sampler yields."""
        try:
            return [index(number) for number in entry] if self.batched else index(entry)
        except TypeError as error:
            raise TypeError(
                f"Argument `datamodule` expected a sampler of indices, but got {self.name}, which yields "
                f"{type(entry).__name__}. Let the data set add what the sampler adds."
            ) from error

    def _flat(self, order: list[Any]) -> list[int]:
        return list(chain.from_iterable(order)) if self.batched else order


def _reseed(sampler: object, seed: int) -> None:
    """Seed the generators that a sampler holds, and those of samplers that it holds."""
    for name, value in list(getattr(sampler, "__dict__", {}).items()):
        if isinstance(value, torch.Generator):
            value.manual_seed(seed)
        elif isinstance(value, random.Random):
            value.seed(seed)
        elif isinstance(value, np.random.RandomState):
            value.seed(seed % 2**32)
        elif isinstance(value, np.random.Generator):
            setattr(sampler, name, np.random.default_rng(seed))
        elif isinstance(value, Sampler):
            _reseed(value, seed)


# Of one epoch; a shard that a sampler hardly ever yields is refused.
MAX_PASSES = 100


class RestrictedOrder:
    """The order of a sampler, restricted to the samples of each shard.

    The sampler yields one epoch for all shards together, the same on every process. Where every epoch holds the same
    samples, each shard gets its own of them. Where it does not (weights, replacement, a random subset), how many fall
    into a shard would differ from epoch to epoch, and processes would take different numbers of steps;
    *(our choice)* every shard then takes an equal number: the first ones that fall into it, of as many passes as that
    takes. For independent choices, such as those of ``WeightedRandomSampler``, that is the sampler's distribution,
    given the shard.

    Args:
        whole: Of the sampler.
        shards: One index tensor per shard.

    Attributes:
        lengths: Samples of each shard in an epoch.

    Example:
        >>> from torch.utils.data import WeightedRandomSampler
        >>> whole = SeededOrder(WeightedRandomSampler([1.0, 1, 0, 0, 1, 1], num_samples=6))
        >>> order = RestrictedOrder(whole, [torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5])])
        >>> [(len(samples), set(samples.tolist()) <= {0, 1, 4, 5}) for samples in order(seed=0, epoch=0)]
        [(3, True), (3, True)]
    """

    def __init__(self, whole: SeededOrder, shards: Sequence[Tensor]) -> None:
        self.whole = whole
        self._owner = owners(shards)
        self._distinct = len(set(whole.first)) == len(whole.first)
        self._last: tuple[tuple[int, int], list[Tensor]] | None = None
        if whole.is_fixed:
            counts = self._owner[torch.as_tensor(whole.first)].bincount(minlength=len(shards))
            self.lengths: list[int] = counts.tolist()
        else:
            each, rest = divmod(len(whole.first), len(shards))
            self.lengths = [each + (shard < rest) for shard in range(len(shards))]

    def reassign(self, shards: Sequence[Tensor]) -> None:
        """Put other samples into the shards; ValueError if the draws of an epoch would not fall as before."""
        owner, lengths = owners(shards), self.lengths
        if self.whole.is_fixed:
            lengths = owner[torch.as_tensor(self.whole.first)].bincount(minlength=len(shards)).tolist()
        if lengths != self.lengths:
            raise ValueError(
                f"Argument `datamodule` expected a sampler that draws every sample equally often, to exchange samples,"
                f" but got {self.whole.name}. Use one without repeats, or exchange none (--redistribution.fraction 0)."
            )
        self._owner, self._last = owner, None

    def __call__(self, seed: int, epoch: int) -> list[Tensor]:
        """Return the samples of every shard in an epoch.

        Raises:
            ValueError: If the sampler yields samples of a shard so rarely that 100 passes do not fill its part.
        """
        if self._last is None or self._last[0] != (seed, epoch):
            self._last = (seed, epoch), self._restrict(seed, epoch)
        return self._last[1]

    def _restrict(self, seed: int, epoch: int) -> list[Tensor]:
        order = torch.empty(0, dtype=torch.long)
        for again in range(MAX_PASSES):
            order = torch.cat([order, torch.as_tensor(self.whole(seed, epoch, again))])
            if self._distinct and again:  # without replacement, also where one pass is not enough
                order = torch.as_tensor(list(dict.fromkeys(order.tolist())))
            owner = self._owner[order]
            orders = [order[owner == shard][:length] for shard, length in enumerate(self.lengths)]
            found = [len(part) for part in orders]
            if found == self.lengths:
                return orders
        raise ValueError(
            f"Argument `datamodule` expected a sampler that yields {self.lengths} samples of the shards, but got "
            f"{self.whole.name}, of which {MAX_PASSES} epochs hold {found}. Use fewer shards, or partition='iid'."
        )


class RestrictedSampler(ShardSampler):
    """A :class:`~lightning_iet.data.ShardSampler` that takes each shard's samples in the order of another sampler."""

    def __init__(
        self,
        restricted: RestrictedOrder,
        shards: Sequence[Tensor],
        batch_size: int,
        *,
        plan: ShardPlan | None = None,
        drop_last: bool = False,
    ) -> None:
        self.restricted = restricted
        super().__init__(shards, batch_size, plan=plan, drop_last=drop_last)

    def reassign(self, shards: Sequence[Tensor]) -> None:
        """See :meth:`ShardSampler.reassign`."""
        super().reassign(shards)
        self.restricted.reassign(shards)

    @property
    def lengths(self) -> list[int]:
        """Samples of each shard in an epoch."""
        return self.restricted.lengths

    def order(self, shard: int, epoch: int) -> Tensor:
        """The samples of a shard in the order of an epoch."""
        return self.restricted(self.seed, epoch)[shard]


class RestrictedBatchSampler(ShardSampler):
    """A :class:`~lightning_iet.data.ShardSampler` that batches each shard's samples as a batch sampler does.

    A batch sampler that groups what its ``sampler`` yields groups each shard's samples instead. Of any other one, which
    makes batches of the whole data set, every shard gets its part of each batch.

    All shards take equally many steps: as many as the one with the fewest batches in the first epoch.

    Args:
        batch_sampler: Its order.
        inner: The order of its ``sampler``; ``None`` = it has none, or does not use it.
        shards: One index tensor per shard.
        plan: See :class:`~lightning_iet.data.ShardSampler`.

    Raises:
        ValueError: If a shard has no batch.
    """

    def __init__(
        self,
        batch_sampler: SeededOrder,
        inner: SeededOrder | None,
        shards: Sequence[Tensor],
        plan: ShardPlan | None = None,
    ) -> None:
        self.whole = batch_sampler
        self.owner = owners(shards)
        self.inner = None if inner is None else RestrictedOrder(inner, shards)
        super().__init__(shards, 1, plan=plan)

    def reassign(self, shards: Sequence[Tensor]) -> None:
        """See :meth:`ShardSampler.reassign`."""
        super().reassign(shards)
        self.owner = owners(shards)
        if self.inner is not None:
            self.inner.reassign(shards)

    def batches(self, shard: int, epoch: int) -> list[list[int]]:
        """Return the batches of a shard in an epoch, of them those of this replica."""
        most, found = self._steps() * self.replicas, list[list[int]]()
        for again in range(MAX_PASSES):
            found += self._batches(shard, epoch, again)
            if len(found) >= most:
                return found[self.plan.rank % self.replicas : most : self.replicas][: self.steps]
        raise ValueError(
            f"Argument `datamodule` expected a batch sampler with {most} batches for every shard, but got "
            f"{self.whole.name}, of which {MAX_PASSES} epochs hold {len(found)} for shard {shard}. Use fewer shards."
        )

    def _batches(self, shard: int, epoch: int, again: int) -> list[list[int]]:
        if self.inner is None:
            mine = [[i for i in batch if self.owner[i] == shard] for batch in self.whole(self.seed, epoch, again)]
            return [batch for batch in mine if batch]
        return grouped(
            self.whole.sampler, self.inner(self.seed, epoch)[shard], derive_seed(self.seed, shard, epoch, again)
        )

    def _steps(self, limit: int | None = None) -> int:
        if not hasattr(self, "_fewest"):
            self._fewest = min(len(self._batches(shard, 0, 0)) for shard in range(len(self.shards)))
        multiple = self.plan.multiple_of
        steps = self._fewest // self.replicas // multiple * multiple
        if steps < 1:
            raise ValueError(
                f"Argument `datamodule` expected a batch sampler with {multiple * self.replicas} batches for every "
                f"shard, but got {self.whole.name} with {self._fewest}. Use smaller batches, or fewer shards."
            )
        return steps if limit is None else min(steps, max(limit // multiple, 1) * multiple)


def uses_its_sampler(batch_sampler: Any, inner: SeededOrder) -> bool:
    """Whether a batch sampler makes its batches of what its ``sampler`` yields."""
    some = torch.as_tensor(inner.first[::2])
    return {i for batch in grouped(batch_sampler, some, seed=0) for i in batch} <= set(some.tolist())


def grouped(batch_sampler: Iterable[Any], order: Tensor, seed: int) -> list[list[int]]:
    """Return the batches that a batch sampler makes of ``order`` instead of its ``sampler``."""
    other: Any = copy.copy(batch_sampler)
    other.sampler = order.tolist()
    with isolated_rng(seed=seed):
        return [list(batch) for batch in other]


def owners(shards: Sequence[Tensor]) -> Tensor:
    """Return the shard of each sample; -1 = none."""
    return to_assignment(shards, max(int(shard.max()) for shard in shards) + 1)


# --- iterable data: every process and worker reads the whole stream and keeps the samples of its shards ---------------


def split_stream(length: int, num_shards: int) -> list[Tensor]:
    """Return the positions of each shard's samples in a stream: sample i goes to shard i mod K.

    Example:
        >>> split_stream(5, 2)
        [tensor([0, 2, 4]), tensor([1, 3])]
    """
    return [torch.arange(shard, length, num_shards) for shard in range(num_shards)]


class StreamedSamples(Dataset[list[Any]]):
    """Reads a stream up to the samples of a batch, as if it had an index.

    A process reads the stream once for each shard that it hosts, and so does each of its workers. It reads all of it:
    ``get_worker_info()`` returns None meanwhile, since a stream that sees a worker yields only that worker's part.
    Every pass starts with the random generators at the same seed, so that sample i is the same sample on every process
    and in every epoch, and shards stay fixed; what is to be random in each epoch belongs into ``collate_fn`` or the
    module.

    Args:
        stream: An iterable data set.
        seed: Of each pass.

    Example:
        >>> class Squares(IterableDataset):
        ...     def __iter__(self):
        ...         return (i * i for i in range(10))
        >>> samples = StreamedSamples(Squares(), seed=0)
        >>> samples[ShardBatch(1, epoch=0, seed=0, indices=[1, 3])], samples[ShardBatch(1, 0, 0, [5, 7])]
        ([1, 9], [25, 49])
    """

    def __init__(self, stream: IterableDataset[Any], *, seed: int) -> None:
        self.stream = stream
        self.seed = seed
        self._passes: dict[int | None, _Pass] = {}

    def __getitem__(self, batch: ShardBatch) -> list[Any]:
        if not batch.indices:
            return []
        reading = self._passes.get(batch.shard)
        if reading is None or reading.position > batch.indices[0]:
            reading = self._passes[batch.shard] = _Pass(self.stream, self.seed)
        return reading.read(batch.indices)

    def __getstate__(self) -> dict[str, Any]:
        return {"stream": self.stream, "seed": self.seed, "_passes": {}}  # a started worker begins a pass of its own


class _Pass:
    """One pass over a stream, with random generators of its own."""

    def __init__(self, stream: IterableDataset[Any], seed: int) -> None:
        self.position = 0
        with isolated_rng(seed=seed), patched_attribute(worker, "_worker_info", None):
            self.samples = iter(stream)
            self.state = get_rng_state()

    def read(self, positions: Sequence[int]) -> list[Any]:
        """Return the samples at increasing positions that have not been passed yet."""
        with isolated_rng(), patched_attribute(worker, "_worker_info", None):
            set_rng_state(self.state)
            samples = [self._at(position) for position in positions]
            self.state = get_rng_state()
        return samples

    def _at(self, position: int) -> Any:
        for sample in self.samples:
            self.position += 1
            if self.position > position:
                return sample
        raise ValueError(
            f"Argument `num_samples` expected at most the length of the stream, but it ended after {self.position} "
            f"samples, before sample {position}. Give its length, or a smaller limit_train_batches."
        )


def fingerprint_of_stream(stream: IterableDataset[Any], *, length: int, seed: int) -> str:
    """Return a hash of a stream's first samples.

    Raises:
        ValueError: If a second pass gives others: shards would then mix.
    """
    positions = range(min(length, FINGERPRINTED))
    first, again = (fingerprint_of_samples(_Pass(stream, seed).read(positions)) for _ in range(2))  # type: ignore[arg-type]
    if first != again:
        raise ValueError(
            f"Argument `datamodule` expected a stream that gives the same samples in every pass, but got "
            f"{type(stream).__name__}, which does not: shards would mix. Fix its order, and shuffle nothing in it."
        )
    return first
