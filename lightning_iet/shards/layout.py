"""Many tensors laid out in one flat tensor per dtype."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Every tensor starts at a multiple of 64 bytes, as a fresh allocation would, so that kernels take the same path.
ALIGNMENT_BYTES = 64


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
    network is a slice of it, and turning to another shard is an exchange of pointers: nothing is copied.

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
        self._places: dict[str, _Place] = {}
        self._lay([(name, tensor) for name, tensor in tensors.items() if name in first])
        self.first_lengths = dict(self.lengths)
        self._lay([(name, tensor) for name, tensor in tensors.items() if name not in first])

    def _lay(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Give tensors their places behind those that have one."""
        for name, tensor in tensors:
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
    def nbytes(self) -> int:
        """Bytes of one flat copy."""
        return sum(length * dtype.itemsize for dtype, length in self.lengths.items())

    @property
    def device(self) -> torch.device:
        """Where the live tensors are."""
        return next(iter(self._places.values())).tensor.device

    def flatten(self) -> dict[torch.dtype, Tensor]:
        """A new flat copy of the live tensors, one tensor ``(n,)`` per dtype."""
        device = self.device
        # Zeros, for the gaps between tensors are averaged and saved too.
        flat = {dtype: torch.zeros(length, dtype=dtype, device=device) for dtype, length in self.lengths.items()}
        for place in self._places.values():
            place.view(flat[place.dtype]).copy_(place.tensor.detach())
        return flat

    def empty(self) -> dict[torch.dtype, Tensor]:
        """Uninitialised memory for a flat copy."""
        return {dtype: torch.empty(length, dtype=dtype, device=self.device) for dtype, length in self.lengths.items()}

    def views(self, flat: Mapping[torch.dtype, Tensor]) -> dict[str, Tensor]:
        """The tensors inside a flat copy, by name."""
        return {name: place.view(flat[place.dtype]) for name, place in self._places.items()}

    def install(self, flat: Mapping[torch.dtype, Tensor]) -> None:
        """Point the live tensors at a flat copy; what is then changed in place is changed in the copy."""
        for place in self._places.values():
            place.tensor.data = place.view(flat[place.dtype])

    def holds(self, flat: Mapping[torch.dtype, Tensor]) -> bool:
        """Whether the live tensors still lie in that copy (nobody has moved the model or replaced a weight)."""
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
    dimensions = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.size(), strict=True) if size > 1)
    expected = 1
    for stride, size in dimensions:
        if stride != expected:
            return False
        expected *= size
    return True
