"""How far the shards of a process have come in the current epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from lightning_iet.data.shard_sampler import ShardSampler
from lightning_iet.functional.sharding import ShardStep
from lightning_iet.shards.own_data import OwnShard

__all__ = ["ShardCourse"]


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
