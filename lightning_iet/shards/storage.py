"""Where shard states are kept: on the device, in host memory or on disk."""

import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_iet.shards.layout import FlatLayout
from lightning_iet.shards.state import ShardState

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


Offload = Literal["auto", "none", "cpu", "disk"]

# The rest of the memory is for activations, data and whatever else is at work.
SHARE = 0.5


def estimate_state_bytes(layout: FlatLayout) -> int:
    """Bytes of one shard's state, with the two moments of Adam, which are made at the first step only."""
    return layout.nbytes + 2 * sum(length * dtype.itemsize for dtype, length in layout.first_lengths.items())


def choose_offload(needed: int, *, device: torch.device, device_free: int, host_free: int) -> Offload:
    """The nearest place that has room: all states in half of its free memory *(our choice)*, or the next one.

    Args:
        needed: Bytes of all states of the process but the one at work.
        device: Where the model is trained.
        device_free: Free bytes there.
        host_free: Free bytes in host memory, for this process.

    Example:
        >>> cuda, gib = torch.device("cuda"), 2**30
        >>> [choose_offload(n * gib, device=cuda, device_free=40 * gib, host_free=100 * gib) for n in (10, 30, 90)]
        ['none', 'cpu', 'disk']
    """
    if needed <= SHARE * device_free:
        return "none"
    if device.type != "cpu" and needed <= SHARE * host_free:
        return "cpu"
    return "disk"


def make_residence(trainer: Trainer, layout: FlatLayout, flat: Flat, *, num_hosted: int, offload: Offload) -> Residence:
    """Make the place for shard states, and say what was decided.

    Args:
        trainer: Its ``default_root_dir`` takes the files of ``"disk"``.
        layout: Of the model.
        flat: Flat tensors at which the model looks.
        num_hosted: Shards of this process.
        offload: What the user asked for.
    """
    if num_hosted == 1:
        return OnDevice()
    device, per_state = layout.device, estimate_state_bytes(layout)
    host_free = psutil.virtual_memory().available // max(trainer.num_devices, 1)
    device_free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_free
    choice = offload
    if offload == "auto":
        needed = (num_hosted - 1) * per_state
        choice = choose_offload(needed, device=device, device_free=device_free, host_free=host_free)
    where = {"none": f"stay on {device}", "cpu": "lie in host memory", "disk": "lie in files"}[choice]
    rank_zero_info(
        f"Shard states: {num_hosted} of about {per_state / 2**20:.0f} MiB in each process {where} "
        f"(offload={offload!r}; free: {device_free / 2**30:.1f} GiB on {device}, {host_free / 2**30:.1f} GiB host)."
    )
    if choice == "none":
        return OnDevice()
    if choice == "cpu":
        return Away(flat, host_memory(device))
    folder = Path(trainer.default_root_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"Argument `offload` expected a folder for the shard states, but got '{folder}' ({error.strerror}). "
            "Give another one as the trainer's `default_root_dir`, or use offload='cpu'."
        ) from error
    return Away(flat, mapped_memory(folder))
