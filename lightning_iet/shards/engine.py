"""The shard models of one process: which is at work, and their average."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_iet.functional.averaging import average_
from lightning_iet.shards.layout import FlatLayout
from lightning_iet.shards.packing import pack, unpack
from lightning_iet.shards.state import ShardState, capture, install, shard_tensors

__all__ = ["ShardEngine"]


class ShardEngine:
    """Holds the states of the shards that a process hosts, and puts one at a time into the model.

    It knows *what* turning to a shard and averaging mean;
    :class:`~lightning_iet.callbacks.ParameterAveragingCallback` decides *when*.

    Args:
        trainer: A trainer about to train: model on its device, optimizers made.
        module: The model; its weights are where all shards start from.
        hosted: The shards of this process.
        sizes: Weight of every shard of the run in the average.
        group: All processes of the run; ``None`` for one process.

    Attributes:
        active: The shard at work; ``None`` before the first one is.
        agreed: Whether no shard has taken a step since the last averaging.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        hosted: Sequence[int],
        sizes: Sequence[float],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.trainer = trainer
        self.sizes = list(sizes)
        self.group = group
        self.agreed = True
        self.active: int | None = None
        self._average_is_shown = False
        floats, counters = shard_tensors(module)
        self.layout = FlatLayout(floats)
        self._counters = list(counters.values())
        first = capture(trainer, self.layout.flatten(), self._counters)
        self.states: dict[int, ShardState] = {hosted[0]: first}
        for shard in hosted[1:]:
            self.states[shard] = first.fork()
        self.layout.install(first.flat)
        self._buffers = [
            (owner, name, buffer)
            for owner in module.modules()
            for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False)
        ]

    # --- turns -----------------------------------------------------------------------------------------------------

    def activate(self, shard: int) -> None:
        """Put a shard to work in the place of another. Exchanges references; copies nothing."""
        self.hide_average()
        if shard == self.active:
            return
        self.park()
        state = self.states[shard]
        self.layout.install(state.flat)
        install(self.trainer, state, self._counters)
        self.active = shard

    def park(self) -> None:
        """Take the shard at work back into its state; it stays at work."""
        if self.active is None:
            return
        self._take_back_buffers()
        flat = self.states[self.active].flat
        if not self._average_is_shown and not self.layout.holds(flat):
            # Someone replaced weights instead of changing them in place; their values are what counts.
            for dtype, fresh in self.layout.flatten().items():
                flat[dtype].copy_(fresh)
            self.layout.install(flat)
        self.states[self.active] = capture(self.trainer, flat, self._counters)

    def _take_back_buffers(self) -> None:
        """Keep the tensors that we hold where a module has put a new one in a buffer's place (``n = n + 1``)."""
        for owner, name, ours in self._buffers:
            theirs = getattr(owner, name)
            if theirs is not ours:
                ours.data.copy_(theirs)
                setattr(owner, name, ours)

    # --- the average -----------------------------------------------------------------------------------------------

    def average(self) -> None:
        """End a round: every shard continues from the average of all. Takes part on every process."""
        self.hide_average()
        self.park()
        for copies in self._copies().values():
            average_(copies, self.sizes, group=self.group)
        self.agreed = True

    def show_average(self) -> None:
        """Let the model show the average while every shard keeps its own weights. Takes part on every process."""
        if self.agreed or self._average_is_shown:
            return
        self.park()
        view = self.layout.empty()
        for dtype, copies in self._copies().items():
            average_(copies, self.sizes, into=[view[dtype]], group=self.group)
        self.layout.install(view)
        self._average_is_shown = True

    def hide_average(self) -> None:
        """Put the weights back that were there before :meth:`show_average`."""
        if self._average_is_shown:
            shard = next(iter(self.states)) if self.active is None else self.active
            self.layout.install(self.states[shard].flat)
            self._average_is_shown = False

    def release(self) -> None:
        """Leave the model with what it shows, in memory of its own, and forget the shards."""
        self.layout.release()
        self.states.clear()

    def _copies(self) -> dict[torch.dtype, list[Tensor]]:
        return {dtype: [state.flat[dtype] for state in self.states.values()] for dtype in self.layout.lengths}

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """The states of this process's shards, in plain types, by shard."""
        self.park()
        return {shard: pack(state, self.trainer.optimizers) for shard, state in self.states.items()}

    def load_state_dict(self, states: Mapping[int, dict[str, Any]], *, agreed: bool) -> None:
        """Put this process's shards where :meth:`state_dict` found them; then none is at work.

        Args:
            states: States of at least this process's shards.
            agreed: Whether the states are those after an averaging.
        """
        for shard, state in self.states.items():
            self.states[shard] = unpack(states[shard], into=state, optimizers=self.trainer.optimizers)
        self.active, self.agreed = None, agreed
        # Until a shard is at work (or where all of this process's shards are done), the model shows the first one.
        first = next(iter(self.states.values()))
        for live, counter in zip(self._counters, first.counters, strict=True):
            live.data = counter
