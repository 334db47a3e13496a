"""A shard's state in plain types, as a checkpoint holds it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_iet.shards.state import ShardState

__all__ = ["pack", "unpack"]


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
