"""Whether something has changed in a module: not its weights alone, also counters, lists and random generators."""

import random
import zlib
from collections.abc import Hashable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["module_state"]

_DEPTH = 4
_MOST = 100  # entries of a container that are looked into


def module_state(module: nn.Module) -> dict[str, Hashable]:
    """Sum up all attributes of a module and its parts; where two summaries are the same, nothing has changed.

    Nothing that can be seen from outside, that is: not what closures, open files and objects without ``__dict__`` hold.
    It waits for the device.

    Returns:
        Summaries by the name of the attribute.

    Example:
        >>> module = nn.BatchNorm1d(2)
        >>> before = module_state(module)
        >>> _ = module(torch.rand(4, 2))
        >>> after = module_state(module)
        >>> [name for name in before if before[name] != after[name]]
        ['running_mean', 'running_var', 'num_batches_tracked']
    """
    parts = [(f"{path}." if path else "", part) for path, part in module.named_modules()]
    return {
        prefix + name: _summary(value, _DEPTH)
        for prefix, part in parts
        for name, value in {**vars(part), **part._parameters, **part._buffers}.items()
        if name not in ("_trainer", "_fabric", "_parameters", "_buffers", "_modules")
    }


def _summary(value: Any, depth: int) -> Hashable:
    if isinstance(value, Tensor):
        return _checksum(value)
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    if isinstance(value, torch.Generator):
        return _checksum(value.get_state())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, random.Random | np.random.RandomState):
        return repr(value.getstate() if isinstance(value, random.Random) else value.get_state())
    if isinstance(value, bool | int | float | str | bytes | None):
        return repr(value)
    if depth == 0 or isinstance(value, type | nn.Module) or callable(value):
        return id(value)
    if isinstance(value, Mapping):
        return len(value), tuple(_summary(entry, depth - 1) for entry in list(value.values())[:_MOST])
    if isinstance(value, Sequence | Set):
        return len(value), tuple(_summary(entry, depth - 1) for entry in list(value)[:_MOST])
    if hasattr(value, "__dict__"):
        return tuple((name, _summary(entry, depth - 1)) for name, entry in vars(value).items())
    return id(value)


def _checksum(tensor: Tensor) -> Hashable:
    if tensor.layout != torch.strided or tensor.is_meta:
        return id(tensor)
    plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return tuple(tensor.shape), zlib.crc32(plain.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
