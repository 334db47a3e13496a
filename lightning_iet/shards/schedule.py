"""Which batches of which shard a process trains, and how far it has come."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_iet.data.shard_sampler import ShardSampler
from lightning_iet.functional.sharding import ShardStep, walk
from lightning_iet.shards.groups import gather_objects

log = logging.getLogger(__name__)


@dataclass
class OwnShard:
    """The part of :class:`~lightning_iet.data.ShardSampler` that is used here, for one shard on each process."""

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
        """Return the steps of an epoch. A resumed epoch continues where the user's own loader does."""
        return walk(self.hosted, self.steps, epoch=epoch, round_steps=self.round_steps)

    def __len__(self) -> int:
        return self.steps


def own_shard(trainer: Trainer, round_steps: int | None = None) -> OwnShard:
    """Find out how large the shards of all processes are; all then take as many steps as the smallest has.

    Raises:
        MisconfigurationException: If a ``DistributedSampler`` deals the samples out anew in each epoch, or the length
            of an epoch is not known.
    """
    loader: Any = trainer.train_dataloader
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        raise MisconfigurationException(
            "ParameterAveragingCallback expected every process to read a fixed shard, but got a DistributedSampler, "
            "which deals the samples out anew in each epoch. Use Trainer(use_distributed_sampler=False) with data "
            "of its own on each process, or ShardedDataModule(datamodule, num_shards=…)."
        )
    if trainer.num_training_batches == float("inf") or trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "ParameterAveragingCallback expected training data of one known length on each process, but got an "
            "iterable without one, or reload_dataloaders_every_n_epochs. Use a map-style data set, or set "
            "limit_train_batches."
        )
    # A shard of unknown size is weighted by its batches.
    sized = isinstance(loader, DataLoader) and hasattr(loader.dataset, "__len__")
    size = len(loader.dataset) if sized else int(trainer.num_training_batches)
    everyone = gather_objects((size, trainer.num_training_batches), trainer.world_size)
    sizes, steps = [size for size, _ in everyone], [int(steps) for _, steps in everyone]
    if len(set(steps)) > 1:
        log.warning("Shards have %s batches; each epoch takes the first %d of every shard.", steps, min(steps))
        trainer.fit_loop.max_batches = min(steps)
        if isinstance(trainer.val_check_interval, float):
            trainer.val_check_batch = max(1, int(min(steps) * trainer.val_check_interval))
    return OwnShard(trainer.global_rank, sizes, min(steps), round_steps)


class ShardSchedule:
    """Says which shard a batch trains, and counts the steps of each shard.

    Args:
        sampler: Orders this process's batches.
        resumed: What :meth:`record` returned, for a resumed run; empty for a new one.
    """

    def __init__(self, sampler: ShardSampler | OwnShard, *, resumed: Mapping[str, Any]) -> None:
        self.sampler = sampler
        self.resumed_epoch: int = resumed.get("epoch", -1)
        self.resumed_done: Sequence[int] = resumed.get("done", ())
        self.epoch = self.resumed_epoch
        self.done = {shard: self.resumed_done[shard] if self.resumed_done else 0 for shard in sampler.hosted}
        self._walk: list[ShardStep] | None = None

    def at(self, epoch: int, batch_idx: int) -> ShardStep:
        """Return the step of a batch of the epoch."""
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
        """Count a finished step; return whether it was its shard's last one in the epoch."""
        if step.shard is None:
            return False
        self.done[step.shard] = step.step + 1
        return step.step + 1 == self.sampler.steps

    def batches_before(self) -> int:
        """Return the number of this process's batches that a resumed epoch has behind it."""
        left = len(self.sampler.walk(self.resumed_epoch)) if self.resumed_done else 0
        return len(self.sampler) - left

    def record(self, world_size: int) -> dict[str, Any]:
        """Return the epoch, and the steps of every shard in it (none: it has yet to begin). A collective."""
        everyone = gather_objects(self.done, world_size)
        by_shard = {shard: steps for part in everyone for shard, steps in part.items()}
        # Among batches whose gradients are accumulated, the checkpoint stands before the first: all are taken again.
        window = self.sampler.plan.multiple_of if isinstance(self.sampler, ShardSampler) else 1
        done = [steps // window * window for _, steps in sorted(by_shard.items())]
        finished = set(done) == {self.sampler.steps}
        return {"epoch": max(self.epoch, 0) + finished, "done": [] if finished else done}
