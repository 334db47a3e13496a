"""The shard models of one process: which is at work, and their average."""

from collections.abc import Sequence

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from lightning_iet.functional.averaging import average_
from lightning_iet.shards.layout import FlatLayout
from lightning_iet.shards.state import ShardState, capture, install, shard_tensors, shardwise_callbacks

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
        active: The shard whose state is in the model; ``None`` while the model shows the average.
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
        floats, counters = shard_tensors(module)
        self.layout = FlatLayout(floats)
        self._counters = list(counters.values())
        self.agreed = True
        self.active: int | None = hosted[0]
        first = capture(trainer, self.layout.flatten(), self._counters)
        self.states: dict[int, ShardState] = {hosted[0]: first}
        for shard in hosted[1:]:
            fresh = [callback.fresh_shard_state() for callback in shardwise_callbacks(trainer)]
            self.states[shard] = first.fork(fresh)
        self.layout.install(first.flat)

    def activate(self, shard: int) -> None:
        """Put a shard to work in the place of another. Exchanges references; copies nothing."""
        if shard == self.active:
            return
        self.park()
        state = self.states[shard]
        self.layout.install(state.flat)
        install(self.trainer, state, self._counters)
        self.active = shard

    def park(self) -> None:
        """Take the shard at work back into its state."""
        if self.active is None:
            return
        flat = self.states[self.active].flat
        if not self.layout.holds(flat):
            # Someone replaced weights instead of changing them in place; their values are what counts.
            for dtype, fresh in self.layout.flatten().items():
                flat[dtype].copy_(fresh)
            self.layout.install(flat)
        self.states[self.active] = capture(self.trainer, flat, self._counters)

    def average(self) -> None:
        """End a round: every shard continues from the average of all. Takes part on every process."""
        self._average()
        self.agreed = True

    def show_average(self) -> None:
        """Let the model show the average while every shard keeps its own weights. Takes part on every process."""
        if self.agreed or self.active is None:
            return
        view = self._average(in_place=False)
        self.layout.install(view)
        self._hidden, self.active = self.active, None

    def hide_average(self) -> None:
        """Put the shard back that was at work before :meth:`show_average`."""
        if self.active is None:
            self.active = self._hidden
            self.layout.install(self.states[self.active].flat)

    def release(self) -> None:
        """Leave the model with what it shows, in memory of its own, and forget the shards."""
        self.layout.release()
        self.states.clear()

    def _average(self, *, in_place: bool = True) -> dict:
        self.park()
        view = {} if in_place else self.layout.empty()
        for dtype in self.layout.lengths:
            copies = [state.flat[dtype] for state in self.states.values()]
            average_(copies, self.sizes, into=None if in_place else [view[dtype]], group=self.group)
        return view
