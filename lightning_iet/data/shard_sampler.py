"""The order in which a process reads the samples of its shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lightning_iet.functional.seeding import derive_seed
from lightning_iet.functional.sharding import (
    ShardStep,
    cut_batches,
    hosted_shards,
    num_replicas,
    replica_part,
    resume,
    steps_per_epoch,
    walk,
)
from lightning_iet.utilities.random import isolated_rng, seed_rng


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
    """Steps of each shard between two averagings; None = rounds are whole epochs."""
    multiple_of: int = 1
    """Of accumulated gradients; every shard's number of steps is a multiple of this."""
    limit: int | None = None
    """At most this many steps of each shard in an epoch."""
    epoch: int = 0
    """The epoch in which the run (re)starts."""
    done: tuple[int, ...] = ()
    """Steps that each shard has taken in that epoch before it was cut; empty = none."""


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
        """Put other samples into the shards, from the next epoch on; sizes do not change.

        Args:
            shards: One index tensor per shard, together the same samples as before.
        """
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
    """Reads the samples of a batch, each with random generators seeded by (seed, epoch, index).

    Random flips and crops then depend on the sample and the epoch only: not on the worker that reads it, not on the
    process count, and they leave the random numbers of training as they are.

    Args:
        dataset: A map-style data set.
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
