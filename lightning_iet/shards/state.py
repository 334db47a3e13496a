"""What differs between shards: taken out of the trainer, put back, and written into checkpoints."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer


@runtime_checkable
class ShardwiseCallback(Protocol):
    """A callback that keeps tensors of its own for each shard, as AGC keeps a loss bank."""

    def shard_state(self) -> dict[str, Tensor]:
        """Return references to the tensors of the active shard."""

    def load_shard_state(self, state: dict[str, Tensor]) -> None:
        """Replace the tensors by those of another shard, by reference."""


@dataclass
class ShardState:
    """One shard's model, optimizer and everything else that it does not share with other shards.

    Random generators are not part of it: every step of every shard seeds them from (seed, shard, epoch, step).
    """

    flat: dict[torch.dtype, Tensor]
    """Trainable parameters, EMA and floating buffers; see :class:`~lightning_iet.shards.FlatLayout`."""
    counters: list[Tensor] = field(default_factory=list)
    """Integer and boolean buffers, kept by each shard and never averaged."""
    optimizers: list[tuple[dict[Any, Any], list[dict[str, Any]]]] = field(default_factory=list)
    """State by parameter of each optimizer, and the options (learning rate …) of its parameter groups."""
    schedulers: list[dict[str, Any]] = field(default_factory=list)
    """State of each LR scheduler."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the AMP gradient scaler."""
    callbacks: list[dict[str, Tensor]] = field(default_factory=list)
    """State of each shard-wise callback."""

    def fork(self) -> "ShardState":
        """Return a state for another shard that starts from this one."""
        return self.map(lambda name, tensor: tensor.clone())

    def map(self, function: Callable[[str, Tensor], Tensor]) -> "ShardState":
        """Return a state with ``function(name, tensor)`` in the place of each tensor, and copies of everything else.

        Names say where a tensor belongs, and are the same for all shards of a run.
        """

        def apply(prefix: str, values: dict[Any, Any]) -> dict[Any, Any]:
            return {
                key: function(f"{prefix}/{key}", value) if isinstance(value, Tensor) else copy.deepcopy(value)
                for key, value in values.items()
            }

        return ShardState(
            flat=apply("flat", self.flat),
            counters=[function(f"counter/{number}", counter) for number, counter in enumerate(self.counters)],
            # Keys are the model's parameters, which all shards share as objects: only values are mapped.
            optimizers=[
                (
                    {
                        parameter: apply(f"optimizer/{which}/{number}", values)
                        for number, (parameter, values) in enumerate(state.items())
                    },
                    copy.deepcopy(options),
                )
                for which, (state, options) in enumerate(self.optimizers)
            ],
            schedulers=copy.deepcopy(self.schedulers),
            scaler=copy.deepcopy(self.scaler),
            callbacks=[apply(f"callback/{number}", state) for number, state in enumerate(self.callbacks)],
        )


def capture(
    trainer: Trainer,
    flat: dict[torch.dtype, Tensor],
    counters: Iterable[Tensor],
    callbacks: Iterable[ShardwiseCallback],
) -> ShardState:
    """Take the state of the active shard out of the trainer, tensors by reference."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return ShardState(
        flat=flat,
        counters=[counter.data for counter in counters],
        optimizers=[(dict(optimizer.state), group_options(optimizer)) for optimizer in trainer.optimizers],
        schedulers=[copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        scaler=scaler.state_dict() if scaler is not None else {},
        callbacks=[callback.shard_state() for callback in callbacks],
    )


def install(
    trainer: Trainer, state: ShardState, counters: Iterable[Tensor], callbacks: Iterable[ShardwiseCallback]
) -> None:
    """Put a shard's state into the trainer, the reverse of :func:`capture`; the layout installs the flat tensors."""
    for live, counter in zip(counters, state.counters, strict=True):
        live.data = counter
    for optimizer, (values, options) in zip(trainer.optimizers, state.optimizers, strict=True):
        optimizer.state = defaultdict(dict, values)
        for group, saved in zip(optimizer.param_groups, options, strict=True):
            group.update(saved)
    for config, saved in zip(trainer.lr_scheduler_configs, state.schedulers, strict=True):
        config.scheduler.load_state_dict(copy.deepcopy(saved))
    if state.scaler:
        trainer.precision_plugin.scaler.load_state_dict(state.scaler)  # type: ignore[attr-defined]
    for callback, saved in zip(callbacks, state.callbacks, strict=True):
        callback.load_shard_state(saved)


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Copy the options of the parameter groups."""
    # A learning rate may be a tensor (capturable optimizers); a scheduler then changes it in place.
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def pack(state: ShardState, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Turn a state into dicts, lists, numbers and tensors, which ``torch.load(weights_only=True)`` can read.

    Args:
        state: The state; its tensors are not copied.
        optimizers: Its optimizers; parameters become their numbers in the order of the groups.
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
    """Return the state that :func:`pack` was given, on the device; flat tensors stay where those of ``into`` are.

    Args:
        packed: Content of a checkpoint.
        into: A state of the same model; its flat tensors are overwritten and used.
        optimizers: Optimizers of the model.
        device: Where the model is trained.
    """
    for dtype, flat in into.flat.items():
        flat.copy_(packed["flat"][str(dtype).removeprefix("torch.")])
    loaded = []
    for saved, optimizer in zip(packed["optimizers"], optimizers, strict=True):
        parameters = list(_numbers(optimizer))
        # Step counters lie on the device for fused and capturable optimizers only.
        move_all = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        state: dict[Tensor, dict[str, Any]] = {}
        for number, values in saved["state"].items():
            parameter = parameters[number]
            state[parameter] = {
                name: value.to(parameter.device)
                if isinstance(value, Tensor) and (move_all or value.shape == parameter.shape)
                else value
                for name, value in values.items()
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
    """Number the parameters in the order of the groups."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {parameter: number for number, parameter in enumerate(parameters)}
