"""Which batches of which shard a process trains, and how far it has come."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_iet.data.shard_sampler import ShardSampler
from lightning_iet.functional.sharding import ShardStep, walk

log = logging.getLogger(__name__)


@dataclass
class OwnShard:
    """What the callback asks a :class:`~lightning_iet.data.ShardSampler`, for one shard on each process."""

    rank: int
    sizes: list[int]
    steps: int
    round_steps: int | None = None
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def hosted(self) -> range:
        """This process's shard."""
        return range(self.rank, self.rank + 1)

    def walk(self, epoch: int) -> list[ShardStep]:
        """The steps of an epoch. A cut epoch goes on where the user's own loader does."""
        return walk(self.hosted, self.steps, epoch=epoch, round_steps=self.round_steps)

    def __len__(self) -> int:
        return self.steps


def own_shard(trainer: Trainer, round_steps: int | None = None) -> OwnShard:
    """Find out how large the shards of all processes are; all then take as many steps as the smallest has.

    Raises:
        MisconfigurationException: If a ``DistributedSampler`` deals the samples out anew in each epoch.
    """
    loader: Any = trainer.train_dataloader
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        raise MisconfigurationException(
            "ParameterAveragingCallback expected every process to read a fixed shard, but got a DistributedSampler, "
            "which deals the samples out anew in each epoch. Use Trainer(use_distributed_sampler=False) with data "
            "of its own on each process, or ShardedDataModule(datamodule, num_shards=…)."
        )
    sized = isinstance(loader, DataLoader) and hasattr(loader.dataset, "__len__")
    everyone: list[Any] = [None] * trainer.world_size
    # Without a size, batches are what a shard is weighted by.
    size = len(loader.dataset) if sized else trainer.num_training_batches
    if trainer.num_training_batches == float("inf") or trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "ParameterAveragingCallback expected training data of one known length on each process, but got an "
            "iterable without one, or reload_dataloaders_every_n_epochs. Use a map-style data set, or set "
            "limit_train_batches."
        )
    dist.all_gather_object(everyone, (size, trainer.num_training_batches))
    sizes, steps = [size for size, _ in everyone], [int(steps) for _, steps in everyone]
    if len(set(steps)) > 1:
        log.warning("Shards have %s batches; each epoch takes the first %d of every shard.", steps, min(steps))
        trainer.fit_loop.max_batches = min(steps)
        if isinstance(trainer.val_check_interval, float):
            trainer.val_check_batch = max(1, int(min(steps) * trainer.val_check_interval))
    return OwnShard(trainer.global_rank, sizes, min(steps), round_steps)


class ShardCourse:
    """Says whose step a batch is, and keeps count of the steps that each shard has taken.

    Args:
        sampler: What orders this process's batches.
        resumed: What :meth:`record` returned, for a run that goes on; empty for one that begins.
    """

    def __init__(self, sampler: ShardSampler | OwnShard, *, resumed: Mapping[str, Any]) -> None:
        self.sampler = sampler
        self.resumed_epoch: int = resumed.get("epoch", -1)
        self.resumed_done: Sequence[int] = resumed.get("done", ())
        self.epoch = self.resumed_epoch
        self.done = {shard: self.resumed_done[shard] if self.resumed_done else 0 for shard in sampler.hosted}
        self._walk: list[ShardStep] | None = None

    def at(self, epoch: int, batch_idx: int) -> ShardStep:
        """The step of a batch of the epoch."""
        if epoch != self.epoch or self._walk is None:
            self.epoch = epoch
            self._walk = self.sampler.walk(epoch)
            done = self.resumed_done if epoch == self.resumed_epoch else ()
            self.done = {shard: done[shard] if done else 0 for shard in self.done}
        # A resumed epoch holds what is left of it: the last batches.
        return self._walk[batch_idx - len(self.sampler) + len(self._walk)]

    def is_last(self, batch_idx: int) -> bool:
        """Whether the epoch ends with this batch."""
        return batch_idx + 1 == len(self.sampler)

    def count(self, step: ShardStep) -> bool:
        """Take in a finished step; returns whether it was its shard's last one in the epoch."""
        if step.shard is None:
            return False
        self.done[step.shard] = step.step + 1
        return step.step + 1 == self.sampler.steps

    def batches_before(self) -> int:
        """Batches of this process that a resumed epoch does not hold any more."""
        left = len(self.sampler.walk(self.resumed_epoch)) if self.resumed_done else 0
        return len(self.sampler) - left

    def record(self, world_size: int) -> dict[str, Any]:
        """The epoch, and the steps of every shard in it (none: it has yet to begin). Takes part on every process."""
        everyone: list[Any] = [self.done]
        if world_size > 1:
            everyone = [None] * world_size
            dist.all_gather_object(everyone, self.done)
        by_shard = {shard: steps for part in everyone for shard, steps in part.items()}
        # Inside a window of accumulated gradients there is nothing to go on with: its batches are taken again.
        window = self.sampler.plan.multiple_of if isinstance(self.sampler, ShardSampler) else 1
        done = [steps // window * window for _, steps in sorted(by_shard.items())]
        finished = set(done) == {self.sampler.steps}
        return {"epoch": max(self.epoch, 0) + finished, "done": [] if finished else done}
