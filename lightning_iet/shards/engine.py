"""The shard models of one process: which one is in the module, and how all of them are averaged."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_iet.functional.averaging import average_
from lightning_iet.shards.layout import FlatLayout, shard_tensors
from lightning_iet.shards.state import ShardState, ShardwiseCallback, capture, install, pack, unpack
from lightning_iet.shards.storage import Flat, Offload, make_storage


class ShardEngine:
    """Holds the states of the shards that a process hosts, and puts one at a time into the model.

    This class does the work; :class:`~lightning_iet.callbacks.ParameterAveragingCallback` decides when.

    Args:
        trainer: A trainer about to train: model on its device, optimizers made.
        module: The model; its weights are where all shards start from.
        hosted: The shards of this process.
        sizes: Weight of every shard of the run in the average.
        callbacks: Whatever else keeps a state for each shard.
        group: Processes that together host every shard once; ``None`` for one process.
        offload: Where the states of inactive shards lie; see
            :class:`~lightning_iet.callbacks.ParameterAveragingCallback`.

    Attributes:
        active: The shard that is in the model; ``None`` before the first one is.
        agreed: Whether no shard has taken a step since the last averaging.
        is_averaging: Whether an averaging has begun and not ended: the states are then undefined.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        hosted: Sequence[int],
        sizes: Sequence[float],
        callbacks: Sequence[ShardwiseCallback] = (),
        group: dist.ProcessGroup | None = None,
        offload: Offload = "none",
    ) -> None:
        self.trainer = trainer
        self.sizes = list(sizes)
        self.callbacks = callbacks
        self.group = group
        self.agreed = True
        self.active: int | None = None
        self.is_averaging = False
        self._average_is_shown = False
        floats, counters = shard_tensors(module)
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.layout = FlatLayout(floats, first=trained)
        self._counters = list(counters.values())
        first = capture(trainer, self.layout.flatten(), self._counters, callbacks)
        self._live = first.flat
        self.storage = make_storage(trainer, self.layout, first.flat, num_hosted=len(hosted), offload=offload)
        self.states: dict[int, ShardState] = {}
        for shard in hosted:
            state = first.fork() if self.storage.keeps_tensors and self.states else first
            self.states[shard] = self.storage.store(shard, state)
        self.layout.install(self._live)
        self._buffers = [
            (owner, name, buffer)
            for owner in module.modules()
            for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False)
        ]

    # --- one shard at a time -----------------------------------------------------------------------------------------

    def activate(self, shard: int) -> None:
        """Put a shard into the model in the place of another."""
        self.hide_average()
        if shard == self.active:
            return
        self.park()
        # Gradients that a shard leaves behind (manual optimization that accumulates) must not reach the next one.
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        state = self.storage.load(self.states[shard])
        self._show(state.flat)
        install(self.trainer, state, self._counters, self.callbacks)
        self.active = shard

    def park(self) -> None:
        """Update the state of the active shard; it stays active."""
        if self.active is None:
            return
        # A module may have put a new tensor in a buffer's place (``n = n + 1``): copy its value into ours.
        for owner, name, ours in self._buffers:
            theirs = getattr(owner, name)
            if theirs is not ours:
                ours.data.copy_(theirs)
                setattr(owner, name, ours)
        flat = self._live
        if self._average_is_shown:
            flat = self.states[self.active].flat
        elif not self.layout.holds(flat):
            # Weights were replaced instead of changed in place: copy their values.
            for dtype, fresh in self.layout.flatten().items():
                flat[dtype].copy_(fresh)
            self.layout.install(flat)
        state = capture(self.trainer, flat, self._counters, self.callbacks)
        self.states[self.active] = self.storage.store(self.active, state)

    def release(self) -> None:
        """Leave the model with the weights that it shows, in memory of its own, and forget the shards."""
        self.hide_average()
        self.layout.release()
        self.states.clear()

    def _show(self, flat: Flat) -> None:
        """Point the model at flat tensors on the device."""
        self._live = flat
        self.layout.install(flat)

    def _show_active(self) -> None:
        """Show the active shard; where none is (the process only waits for others), the first."""
        shard = next(iter(self.states)) if self.active is None else self.active
        self._show(self.storage.load_flat(self.states[shard].flat))

    # --- the average -------------------------------------------------------------------------------------------------

    def average(self) -> Tensor:
        """End a round: every shard continues from the average of all. A collective.

        Returns:
            How far each of this process's shard models was from the average, as the norm of the difference of the
            trained parameters over the norm of their average, float64, shape ``(hosted shards,)``.
        """
        self.hide_average()
        self.park()
        self.is_averaging = True
        device = next(iter(next(iter(self.states.values())).flat.values())).device
        precise = torch.float64 if device.type == "cpu" else torch.float32  # not all accelerators have float64
        squared = torch.zeros(len(self.states), dtype=precise, device=device)
        norm = torch.zeros((), dtype=precise, device=device)
        for dtype, flats in self._flats().items():
            split = self.layout.first_lengths.get(dtype, 0)
            trained, others = ([flat[part] for flat in flats] for part in (slice(split), slice(split, None)))
            if split:
                average_(trained, self.sizes, group=self.group, squared_distances=squared)
                norm += torch.linalg.vector_norm(trained[0]).to(precise).square()
            if len(others[0]):
                average_(others, self.sizes, group=self.group)
        self.agreed, self.is_averaging = True, False
        self._show_active()
        return squared.double().cpu().sqrt() / norm.double().cpu().sqrt()

    @contextmanager
    def average_shown(self) -> Iterator[None]:
        """Show the average inside a block; after it the model shows what it did before. A collective."""
        shown_before = self._average_is_shown
        self.show_average()
        try:
            yield
        finally:
            if not shown_before:
                self.hide_average()

    def show_average(self) -> None:
        """Let the model show the average while every shard keeps its own weights. A collective."""
        if self.agreed or self._average_is_shown:
            return
        self.park()
        average = self.storage.empty(self.layout)
        for dtype, flats in self._flats().items():
            average_(flats, self.sizes, into=[average[dtype]], group=self.group)
        self._average_is_shown = True
        self._show(self.storage.load_flat(average))

    def hide_average(self) -> None:
        """Put the weights back that were there before :meth:`show_average`."""
        if self._average_is_shown:
            self._show_active()
            self._average_is_shown = False

    def _flats(self) -> dict[torch.dtype, list[Tensor]]:
        """Return the flat tensors of this process's shards, by dtype."""
        return {dtype: [state.flat[dtype] for state in self.states.values()] for dtype in self.layout.lengths}

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """Return the states of this process's shards, in plain types, by shard."""
        self.park()
        return {shard: pack(state, self.trainer.optimizers) for shard, state in self.states.items()}

    def load_state_dict(self, states: Mapping[int, dict[str, Any]], *, agreed: bool) -> None:
        """Restore what :meth:`state_dict` returned; then no shard is active.

        Args:
            states: States of at least this process's shards.
            agreed: Whether the states are those after an averaging.
        """
        for shard, state in self.states.items():
            loaded = unpack(states[shard], into=state, optimizers=self.trainer.optimizers, device=self.layout.device)
            self.states[shard] = self.storage.store(shard, loaded)
        self.active, self.agreed = None, agreed
        self._show_active()
        for live, counter in zip(self._counters, next(iter(self.states.values())).counters, strict=True):
            live.data = counter.to(live.device, copy=True)
