"""Shards of processes that read data of their own, each its part, without a data module of ours."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_iet.functional.sharding import ShardStep, walk

__all__ = ["OwnShard", "own_shard"]

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
