"""Which tensors of a model differ between shards, and how they lie in one flat tensor per dtype."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_iet.shards.ema import averaged_modules, frozen_modules, unregistered_averages, weight_averagings
from lightning_iet.utilities.fingerprints import checksums

# Every tensor starts at a multiple of 64 bytes, as a fresh allocation would, so that kernels take the same path.
ALIGNMENT_BYTES = 64


# --- which tensors ---------------------------------------------------------------------------------------------------


def shard_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors that training changes: (floating ones, counters), by name.

    They are trainable parameters, all buffers, and averages of the weights (an EMA has no gradients, and yet changes)
    in whatever form: an ``AveragedModel``, a deep copy, plain tensors, or the average of Lightning's
    ``WeightAveraging``. Frozen parameters, and the buffers of modules that have no others, are left out: shards share
    them.

    Example:
        >>> floats, counters = shard_tensors(nn.BatchNorm1d(2))
        >>> list(floats), list(counters)
        (['weight', 'bias', 'running_mean', 'running_var'], ['num_batches_tracked'])
    """
    averaged = {id(p) for part in averaged_modules(module) for p in part.parameters()}
    tensors: dict[str, Tensor] = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or id(parameter) in averaged
    }
    # Buffers of frozen modules are tables, and shared; statistics change in each forward, also in a frozen module.
    frozen = {id(part) for largest in frozen_modules(module) for part in largest.modules()}
    fixed = {
        id(buffer)
        for part in module.modules()
        if id(part) in frozen and not hasattr(part, "track_running_stats")
        for buffer in part.buffers(recurse=False)
    }
    tensors.update({name: buffer for name, buffer in module.named_buffers() if id(buffer) not in fixed})
    of_callbacks: dict[str, Tensor] = {}
    for callback in weight_averagings(getattr(module, "_trainer", None)):
        if (average := callback._average_model) is not None:
            kept = {**dict(average.module.named_parameters()), **dict(average.module.named_buffers())}
            found = {name: kept[name] for name in tensors if name in kept} | {"n_averaged": average.n_averaged}
            of_callbacks.update({f"{type(callback).__name__}.{name}": tensor for name, tensor in found.items()})
    tensors.update({slot.name: slot.get() for slot in unregistered_averages(module)[0]})
    tensors.update(of_callbacks)
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() or tensor.is_complex()}
    return floats, {name: tensor for name, tensor in tensors.items() if name not in floats}


def frozen_tensors(module: nn.Module, kept: Iterable[Tensor] | None = None) -> dict[str, Tensor]:
    """Return the tensors that shards share, by name: all but ``kept``, by default those of :func:`shard_tensors`."""
    if kept is None:
        kept = [tensor for tensors in shard_tensors(module) for tensor in tensors.values()]
    own = {id(tensor) for tensor in kept}
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if id(tensor) not in own}


class FrozenWatch:
    """Refuses to continue when a tensor that shards share has changed: the next shard would start from it.

    Args:
        module: About to be trained.
        kept: The tensors that each shard has its own of; default: those of :func:`shard_tensors`.

    Example:
        >>> module = nn.Linear(2, 2).requires_grad_(False)
        >>> watch = FrozenWatch(module)
        >>> watch.check()
        >>> module.bias.data += 1
        >>> watch.check()
        Traceback (most recent call last):
        ...
        lightning.fabric.utilities.exceptions.MisconfigurationException: ParameterAveragingCallback expected ...
    """

    def __init__(self, module: nn.Module, kept: Iterable[Tensor] | None = None) -> None:
        self._tensors = frozen_tensors(module, kept)
        self._before = checksums(self._tensors.values())

    def check(self) -> None:
        """Compare the tensors with those at the start.

        Raises:
            MisconfigurationException: If one has changed.
        """
        changed = (checksums(self._tensors.values()) != self._before).tolist()
        names = [name for name, change in zip(self._tensors, changed, strict=True) if change]
        if unfrozen := [name for name in names if self._tensors[name].requires_grad]:
            raise MisconfigurationException(
                f"ParameterAveragingCallback expected what trains to change at the start of an epoch, for all shards "
                f"alike, but got '{unfrozen[0]}', which began to train in the middle of one. Unfreeze it in "
                "on_train_epoch_start, as Lightning's BaseFinetuning does, or before training."
            )
        if names:
            raise MisconfigurationException(
                f"ParameterAveragingCallback expected frozen tensors to stay as they are, but got changes of "
                f"{len(names)}, '{names[0]}' the first: shards would share them. Keep an average of weights as a deep "
                "copy of the whole network, or as torch.optim.swa_utils.AveragedModel; keep other state as buffers of "
                "a module that is trained."
            )


# --- where they lie --------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    tensor: Tensor
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.size, self.stride, self.offset)


class FlatLayout:
    """Where each of a model's tensors lies in a flat copy of them.

    With all tensors of a shard in one piece of memory, an averaging is arithmetic on one tensor, a message over the
    network is a slice of it, and activating another shard is an exchange of pointers: nothing is copied.

    Args:
        tensors: Live floating tensors by name (parameters, buffers). Memory formats such as ``channels_last`` are kept.
        first: Names of tensors that lie before all others.

    Attributes:
        lengths: Elements of a flat copy, by dtype.
        first_lengths: Those of them that the tensors in ``first`` take up.

    Raises:
        ValueError: If a tensor's elements overlap in memory (an expanded buffer).

    Example:
        >>> weight = torch.nn.Parameter(torch.arange(3.0))
        >>> layout = FlatLayout({"weight": weight})
        >>> copy = layout.flatten()
        >>> copy[torch.float32][:3].add_(1)
        tensor([1., 2., 3.])
        >>> layout.install(copy)
        >>> weight.data
        tensor([1., 2., 3.])
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, first: Collection[str] = ()) -> None:
        self.lengths: dict[torch.dtype, int] = {}
        self.first_lengths: dict[torch.dtype, int] = {}
        self._places: dict[str, _Place] = {}
        for is_first in (True, False):
            for name, tensor in tensors.items():
                if (name in first) == is_first:
                    self._append(name, tensor)
            if is_first:
                self.first_lengths = dict(self.lengths)

    def _append(self, name: str, tensor: Tensor) -> None:
        strides = tensor.stride() if _is_dense(tensor) else torch.empty_like(tensor).stride()
        offset = self.lengths.get(tensor.dtype, 0)
        self._places[name] = _Place(tensor, tensor.dtype, offset, tensor.size(), strides)
        step = max(ALIGNMENT_BYTES // tensor.element_size(), 1)
        self.lengths[tensor.dtype] = offset + -(-tensor.numel() // step) * step

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of each tensor, by name; two checkpoints of one model have the same."""
        return {name: list(place.size) for name, place in self._places.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The live tensors, by name."""
        return {name: place.tensor for name, place in self._places.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of one flat copy."""
        return sum(length * dtype.itemsize for dtype, length in self.lengths.items())

    @property
    def device(self) -> torch.device:
        """Where the live tensors are."""
        return next(iter(self._places.values())).tensor.device

    def flatten(self) -> dict[torch.dtype, Tensor]:
        """Return a new flat copy of the live tensors, one tensor ``(n,)`` per dtype."""
        device = self.device
        # Zeros, for the gaps between tensors are averaged and saved too.
        flat = {dtype: torch.zeros(length, dtype=dtype, device=device) for dtype, length in self.lengths.items()}
        for place in self._places.values():
            place.view(flat[place.dtype]).copy_(place.tensor.detach())
        return flat

    def empty(self) -> dict[torch.dtype, Tensor]:
        """Return uninitialised memory for a flat copy."""
        return {dtype: torch.empty(length, dtype=dtype, device=self.device) for dtype, length in self.lengths.items()}

    def views(self, flat: Mapping[torch.dtype, Tensor]) -> dict[str, Tensor]:
        """Return the tensors inside a flat copy, by name."""
        return {name: place.view(flat[place.dtype]) for name, place in self._places.items()}

    def install(self, flat: Mapping[torch.dtype, Tensor]) -> None:
        """Point the live tensors at a flat copy: changes in place then change the copy."""
        for place in self._places.values():
            place.tensor.data = place.view(flat[place.dtype])

    def holds(self, flat: Mapping[torch.dtype, Tensor]) -> bool:
        """Whether the live tensors still lie in that copy: the model was not moved, and no weight replaced."""
        return all(
            place.tensor.data_ptr() == flat[place.dtype].data_ptr() + place.offset * place.dtype.itemsize
            for place in self._places.values()
            if place.tensor.numel()
        )

    def release(self) -> None:
        """Give every live tensor memory of its own again, values kept."""
        for place in self._places.values():
            place.tensor.data = place.tensor.data.clone()


def _is_dense(tensor: Tensor) -> bool:
    """Whether strides describe each element of one block of memory exactly once, in some order."""
    expected = 1
    for stride, size in sorted(pair for pair in zip(tensor.stride(), tensor.size(), strict=True) if pair[1] > 1):
        if stride != expected:
            return False
        expected *= size
    return True
