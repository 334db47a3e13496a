"""The weights that a checkpoint shows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_iet.functional.averaging import average_
from lightning_iet.shards.layout import FlatLayout
from lightning_iet.shards.state import ShardState, capture, install, shard_tensors
from lightning_iet.shards.storage import Offload, make_residence


def pack(state: ShardState, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Turn a state into dicts, lists, numbers and tensors, which ``torch.load(weights_only=True)`` reads back.

    Args:
        state: The state; its tensors are referred to, not copied.
        optimizers: Those it belongs to; parameters become their numbers in the order of the groups.
    """
    return {
        "flat": {str(dtype).removeprefix("torch."): flat for dtype, flat in state.flat.items()},
        "counters": state.counters,
        "optimizers": [
            {"state": {number[parameter]: values for parameter, values in saved.items()}, "groups": groups}
            for (saved, groups), number in zip(state.optimizers, map(_numbers, optimizers), strict=True)
        ],
        "schedulers": state.schedulers,
        "scaler": state.scaler,
        "callbacks": state.callbacks,
    }


def unpack(
    packed: dict[str, Any], *, into: ShardState, optimizers: Sequence[Optimizer], device: torch.device
) -> ShardState:
    """The reverse of :func:`pack`: a state on the device, but for its flat tensors, which are filled where they are.

    Args:
        packed: What a checkpoint holds.
        into: A state of the same model; its flat tensors are overwritten and used.
        optimizers: Those that the state will belong to.
        device: Where the model is trained.
    """
    for dtype, flat in into.flat.items():
        flat.copy_(packed["flat"][str(dtype).removeprefix("torch.")])
    loaded = []
    for saved, optimizer in zip(packed["optimizers"], optimizers, strict=True):
        parameters = list(_numbers(optimizer))
        on_device = [group.get("fused") or group.get("capturable") for group in optimizer.param_groups]
        state = {
            parameters[number]: _values(values, parameters[number], move_all=any(on_device))
            for number, values in saved["state"].items()
        }
        loaded.append((state, saved["groups"]))
    return ShardState(
        flat=into.flat,
        counters=[counter.to(device) for counter in packed["counters"]],
        optimizers=loaded,
        schedulers=packed["schedulers"],
        scaler=packed["scaler"],
        callbacks=[{name: tensor.to(device) for name, tensor in saved.items()} for saved in packed["callbacks"]],
    )


def _numbers(optimizer: Optimizer) -> dict[Tensor, int]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {parameter: number for number, parameter in enumerate(parameters)}


def _values(values: dict[str, Any], parameter: Tensor, *, move_all: bool) -> dict[str, Any]:
    """Move what belongs to a parameter to its device; step counters only for fused and capturable optimizers."""

    def place(value: Any) -> Any:
        belongs = isinstance(value, torch.Tensor) and (move_all or value.shape == parameter.shape)
        return value.to(parameter.device) if belongs else value

    return {name: place(value) for name, value in values.items()}


class ShardEngine:
    """Holds the states of the shards that a process hosts, and puts one at a time into the model.

    It knows *what* turning to a shard and averaging mean;
    :class:`~lightning_iet.callbacks.ParameterAveragingCallback` decides *when*.

    Args:
        trainer: A trainer about to train: model on its device, optimizers made.
        module: The model; its weights are where all shards start from.
        hosted: The shards of this process.
        sizes: Weight of every shard of the run in the average.
        group: Processes that together host every shard once; ``None`` for one process.
        offload: Where states lie that are not at work; see
            :class:`~lightning_iet.callbacks.ParameterAveragingCallback`.

    Attributes:
        active: The shard at work; ``None`` before the first one is.
        agreed: Whether no shard has taken a step since the last averaging.
        is_averaging: Whether an averaging has begun and not ended: shards may be anything.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        hosted: Sequence[int],
        sizes: Sequence[float],
        group: dist.ProcessGroup | None = None,
        offload: Offload = "none",
    ) -> None:
        self.trainer = trainer
        self.sizes = list(sizes)
        self.group = group
        self.agreed = True
        self.active: int | None = None
        self.is_averaging = False
        self._average_is_shown = False
        floats, counters = shard_tensors(module)
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.layout = FlatLayout(floats, first=trained)
        self._counters = list(counters.values())
        first = capture(trainer, self.layout.flatten(), self._counters)
        self._live = first.flat
        self.residence = make_residence(trainer, self.layout, first.flat, num_hosted=len(hosted), offload=offload)
        self.states: dict[int, ShardState] = {}
        for shard in hosted:
            state = first.fork() if self.residence.shares and self.states else first
            self.states[shard] = self.residence.take_in(shard, state)
        self.layout.install(self._live)
        self._buffers = [
            (owner, name, buffer)
            for owner in module.modules()
            for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False)
        ]

    # --- turns -----------------------------------------------------------------------------------------------------

    def activate(self, shard: int) -> None:
        """Put a shard to work in the place of another."""
        self.hide_average()
        if shard == self.active:
            return
        self.park()
        # Gradients that a shard leaves behind (manual optimization that accumulates) must not reach the next one.
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        state = self.residence.bring(self.states[shard])
        self._show(state.flat)
        install(self.trainer, state, self._counters)
        self.active = shard

    def park(self) -> None:
        """Take the shard at work back into its state; it stays at work."""
        if self.active is None:
            return
        self._take_back_buffers()
        flat = self._live
        if self._average_is_shown:
            flat = self.states[self.active].flat
        elif not self.layout.holds(flat):
            # Someone replaced weights instead of changing them in place; their values are what counts.
            for dtype, fresh in self.layout.flatten().items():
                flat[dtype].copy_(fresh)
            self.layout.install(flat)
        state = capture(self.trainer, flat, self._counters)
        self.states[self.active] = self.residence.take_in(self.active, state)

    def _take_back_buffers(self) -> None:
        """Keep the tensors that we hold where a module has put a new one in a buffer's place (``n = n + 1``)."""
        for owner, name, ours in self._buffers:
            theirs = getattr(owner, name)
            if theirs is not ours:
                ours.data.copy_(theirs)
                setattr(owner, name, ours)

    def _show(self, flat: dict[torch.dtype, Tensor]) -> None:
        """Let the model look at flat tensors on the device."""
        self._live = flat
        self.layout.install(flat)

    # --- the average -----------------------------------------------------------------------------------------------

    def average(self) -> Tensor:
        """End a round: every shard continues from the average of all. Takes part on every process.

        Returns:
            How far each of this process's shard models was from the average, as the norm of the difference of the
            trained parameters over the norm of their average, float64, shape ``(hosted shards,)``.
        """
        self.hide_average()
        self.park()
        self.is_averaging = True
        squared, norm = self._average_all()
        self.agreed, self.is_averaging = True, False
        # A process that only waits has no shard at work; its model shows the first.
        shard = next(iter(self.states)) if self.active is None else self.active
        self._show(self.residence.bring_flat(self.states[shard].flat))
        return squared.double().cpu().sqrt() / norm.double().cpu().sqrt()

    def _average_all(self) -> tuple[Tensor, Tensor]:
        """Average, and return squares: of each shard's distance from the average, and of the average's norm."""
        device = next(iter(next(iter(self.states.values())).flat.values())).device
        precise = torch.float64 if device.type == "cpu" else torch.float32  # not all accelerators have the former
        squared = torch.zeros(len(self.states), dtype=precise, device=device)
        norm = torch.zeros((), dtype=precise, device=device)
        for dtype, copies in self._copies().items():
            split = self.layout.first_lengths.get(dtype, 0)
            trained, others = ([copy[part] for copy in copies] for part in (slice(split), slice(split, None)))
            if split:
                average_(trained, self.sizes, group=self.group, squared_distances=squared)
                norm += torch.linalg.vector_norm(trained[0]).to(precise).square()
            if len(others[0]):
                average_(others, self.sizes, group=self.group)
        return squared, norm

    @contextmanager
    def average_shown(self) -> Iterator[None]:
        """Show the average inside; after it the model shows what it did before. Takes part on every process."""
        shown_before = self._average_is_shown
        self.show_average()
        try:
            yield
        finally:
            if not shown_before:
                self.hide_average()

    def show_average(self) -> None:
        """Let the model show the average while every shard keeps its own weights. Takes part on every process."""
        if self.agreed or self._average_is_shown:
            return
        self.park()
        view = self.residence.empty(self.layout)
        for dtype, copies in self._copies().items():
            average_(copies, self.sizes, into=[view[dtype]], group=self.group)
        self._average_is_shown = True
        self._show(self.residence.bring_flat(view))

    def hide_average(self) -> None:
        """Put the weights back that were there before :meth:`show_average`."""
        if self._average_is_shown:
            shard = next(iter(self.states)) if self.active is None else self.active
            self._show(self.residence.bring_flat(self.states[shard].flat))
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
            loaded = unpack(states[shard], into=state, optimizers=self.trainer.optimizers, device=self.layout.device)
            self.states[shard] = self.residence.take_in(shard, loaded)
        self.active, self.agreed = None, agreed
        # Until a shard is at work (or where all of this process's shards are done), the model shows the first one.
        first = next(iter(self.states.values()))
        self._show(self.residence.bring_flat(first.flat))
        for live, counter in zip(self._counters, first.counters, strict=True):
            live.data = counter.to(live.device, copy=True)


def average_saved(module: LightningModule, engine: ShardEngine) -> Callable[[dict[str, Any]], None]:
    """The module's ``on_save_checkpoint``, called for full checkpoints and for weights alone, with the average.

    Args:
        module: The model; its own ``on_save_checkpoint`` is called, and sees the average too.
        engine: Its shards.
    """
    own = module.on_save_checkpoint

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        with engine.average_shown():
            # Copies: a view of the flat tensor would be saved with all of it.
            checkpoint["state_dict"] = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            own(checkpoint)

    return on_save_checkpoint
