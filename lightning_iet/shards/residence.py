"""Where the states of shards lie that are not at work: on the device, in host memory, or on disk."""

import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_iet.shards.layout import FlatLayout
from lightning_iet.shards.state import ShardState

__all__ = ["Away", "OnDevice", "Residence", "host_memory", "mapped_memory"]

Flat = dict[torch.dtype, Tensor]
SMALLEST_FILE = 1 << 16  # bytes; counters and biases stay in memory
Allocate = Callable[[torch.Size, torch.dtype], Tensor]


class Residence(ABC):
    """Takes in the states of shards, and brings them to the device one at a time."""

    shares: bool
    """Whether what is taken in stays the very tensors that were given."""

    @abstractmethod
    def take_in(self, shard: int, state: ShardState) -> ShardState:
        """A state of which other shards' turns leave no trace; what is passed may be used up."""

    @abstractmethod
    def bring(self, state: ShardState) -> ShardState:
        """A state to work on, on the device."""

    @abstractmethod
    def bring_flat(self, flat: Flat) -> Flat:
        """The same for flat tensors alone; what :meth:`bring` brought before may be overwritten."""

    @abstractmethod
    def empty(self, layout: FlatLayout) -> Flat:
        """Uninitialised memory for flat tensors, beside those of the states."""


class OnDevice(Residence):
    """All states stay on the device: a turn exchanges references and copies nothing."""

    shares = True

    def take_in(self, shard: int, state: ShardState) -> ShardState:
        """The state itself."""
        return state

    def bring(self, state: ShardState) -> ShardState:
        """The state itself."""
        return state

    def bring_flat(self, flat: Flat) -> Flat:
        """The tensors themselves."""
        return flat

    def empty(self, layout: FlatLayout) -> Flat:
        """On the device."""
        return layout.empty()


class Away(Residence):
    """States lie elsewhere; the device has room for one, the *desk*, and a turn copies its content out and in.

    Memory is allocated once for each tensor of each shard, and used for the whole run.

    Args:
        flat: The flat tensors on the device at which the model looks: they stay the desk's.
        allocate: Makes memory of a shape and dtype where states are to lie.
    """

    shares = False

    def __init__(self, flat: Flat, allocate: Allocate) -> None:
        self._allocate = allocate
        self._desk: dict[str, Tensor] = {f"flat/{dtype}": tensor for dtype, tensor in flat.items()}
        self._devices = {name: tensor.device for name, tensor in self._desk.items()}
        self._memory: dict[tuple[int, str], Tensor] = {}

    def take_in(self, shard: int, state: ShardState) -> ShardState:
        """Copy a state from the desk (or from wherever it is) to its place."""
        return state.map(lambda name, tensor: self._store(shard, name, tensor))

    def bring(self, state: ShardState) -> ShardState:
        """Copy a state to the desk, and clear away what the state before had and this one has not."""
        names: set[str] = set()

        def lay_out(name: str, tensor: Tensor) -> Tensor:
            names.add(name)
            return self._lay_out(name, tensor)

        brought = state.map(lay_out)
        self._desk = {name: tensor for name, tensor in self._desk.items() if name in names}
        return brought

    def bring_flat(self, flat: Flat) -> Flat:
        """Copy flat tensors to the desk."""
        return {dtype: self._lay_out(f"flat/{dtype}", tensor) for dtype, tensor in flat.items()}

    def empty(self, layout: FlatLayout) -> Flat:
        """Where the states lie."""
        return {dtype: self._allocate(torch.Size([length]), dtype) for dtype, length in layout.lengths.items()}

    def _store(self, shard: int, name: str, tensor: Tensor) -> Tensor:
        memory = self._memory.get((shard, name))
        if memory is tensor:
            return memory
        if not name.startswith("flat/"):
            self._desk[name] = tensor
            self._devices[name] = tensor.device
        if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
            memory = self._memory[shard, name] = self._allocate(tensor.shape, tensor.dtype)
        return memory.copy_(tensor)

    def _lay_out(self, name: str, tensor: Tensor) -> Tensor:
        place = self._desk.get(name)
        if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
            place = self._desk[name] = torch.empty_like(tensor, device=self._devices[name])
        return place.copy_(tensor, non_blocking=True)  # from pinned memory, without a wait


def host_memory(device: torch.device) -> Allocate:
    """Allocates in host memory, page-locked where a GPU copies from it."""

    def allocate(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")

    return allocate


def mapped_memory(folder: Path) -> Allocate:
    """Allocates in files that are mapped into memory: the system writes them to disk as it needs the room.

    The files have no name any more once they are mapped, so that nothing of them is left when the process ends, in
    whatever way.

    Args:
        folder: Where; it must lie on a disk (``/tmp`` may lie in memory), with room for all states.

    Example:
        >>> tensor = mapped_memory(Path("."))(torch.Size([128, 128]), torch.float32)
        >>> tensor.shape, tensor.sum().item()
        (torch.Size([128, 128]), 0.0)
    """

    def allocate(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        if count * dtype.itemsize < SMALLEST_FILE:
            return torch.empty(shape, dtype=dtype)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".shard-state-") as file:
            _take_room(file.fileno(), count * dtype.itemsize, folder)
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)

    return allocate


def _take_room(file: int, size: int, folder: Path) -> None:
    """Make a file as large as it will be now: a disk that is full later would kill the process by a signal."""
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file, 0, size)
        else:
            os.truncate(file, size)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Argument `offload` expected room for the shard states in '{folder}', but got: {error.strerror}. "
            "Give another folder as the trainer's `default_root_dir`, or use offload='cpu'.",
        ) from error
