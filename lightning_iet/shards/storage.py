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
from lightning_iet.utilities.files import check_writable

Flat = dict[torch.dtype, Tensor]
Allocate = Callable[[torch.Size, torch.dtype], Tensor]
Offload = Literal["auto", "none", "cpu", "disk"]

SMALLEST_FILE = 1 << 16  # bytes; counters and biases stay in memory
SHARE = 0.5  # of the free memory; the rest is for activations and data


class Storage(ABC):
    """Stores the states of shards, and loads them onto the device one at a time."""

    keeps_tensors: bool
    """Whether a stored state consists of the very tensors that were given."""

    @abstractmethod
    def store(self, shard: int, state: ShardState) -> ShardState:
        """Return a state that does not change while other shards are active; the one passed may be used up."""

    @abstractmethod
    def load(self, state: ShardState) -> ShardState:
        """Return a stored state on the device."""

    @abstractmethod
    def load_flat(self, flat: Flat) -> Flat:
        """Do the same for flat tensors alone; what :meth:`load` returned before may be overwritten."""

    @abstractmethod
    def empty(self, layout: FlatLayout) -> Flat:
        """Return uninitialised memory for flat tensors, where the states are stored."""


class OnDevice(Storage):
    """Keeps all states on the device: activating a shard exchanges references and copies nothing."""

    keeps_tensors = True

    def store(self, shard: int, state: ShardState) -> ShardState:
        """Return the state itself."""
        return state

    def load(self, state: ShardState) -> ShardState:
        """Return the state itself."""
        return state

    def load_flat(self, flat: Flat) -> Flat:
        """Return the tensors themselves."""
        return flat

    def empty(self, layout: FlatLayout) -> Flat:
        """Return memory on the device."""
        return layout.empty()


class Offloaded(Storage):
    """Keeps states elsewhere; the device has room for one of them, whose tensors are overwritten by the next.

    Memory is allocated once for each tensor of each shard, and used for the whole run.

    Args:
        flat: The flat tensors on the device at which the model points: they are part of that room.
        allocate: Allocates memory of a shape and dtype where states are stored.
    """

    keeps_tensors = False

    def __init__(self, flat: Flat, allocate: Allocate) -> None:
        self._allocate = allocate
        self._on_device: dict[str, Tensor] = {f"flat/{dtype}": tensor for dtype, tensor in flat.items()}
        self._devices = {name: tensor.device for name, tensor in self._on_device.items()}
        self._stored: dict[tuple[int, str], Tensor] = {}

    def store(self, shard: int, state: ShardState) -> ShardState:
        """Copy a state to where it is stored."""
        return state.map(lambda name, tensor: self._store(shard, name, tensor))

    def load(self, state: ShardState) -> ShardState:
        """Copy a state to the device, and free the tensors of the state before that this one does not have."""
        names: set[str] = set()

        def load(name: str, tensor: Tensor) -> Tensor:
            names.add(name)
            return self._load(name, tensor)

        loaded = state.map(load)
        self._on_device = {name: tensor for name, tensor in self._on_device.items() if name in names}
        return loaded

    def load_flat(self, flat: Flat) -> Flat:
        """Copy flat tensors to the device."""
        return {dtype: self._load(f"flat/{dtype}", tensor) for dtype, tensor in flat.items()}

    def empty(self, layout: FlatLayout) -> Flat:
        """Return memory where the states are stored."""
        return {dtype: self._allocate(torch.Size([length]), dtype) for dtype, length in layout.lengths.items()}

    def _store(self, shard: int, name: str, tensor: Tensor) -> Tensor:
        memory = self._stored.get((shard, name))
        if memory is tensor:
            return memory
        if not name.startswith("flat/"):
            self._on_device[name] = tensor
            self._devices[name] = tensor.device
        self._devices.setdefault(name, tensor.device)
        if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
            memory = self._stored[shard, name] = self._allocate(tensor.shape, tensor.dtype)
        return memory.copy_(tensor)

    def _load(self, name: str, tensor: Tensor) -> Tensor:
        place = self._on_device.get(name)
        if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
            place = self._on_device[name] = torch.empty_like(tensor, device=self._devices[name])
        return place.copy_(tensor, non_blocking=True)  # asynchronous from pinned memory


def host_memory(device: torch.device) -> Allocate:
    """Return a function that allocates host memory, page-locked where a GPU copies from it."""

    def allocate(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")

    return allocate


def mapped_memory(folder: Path) -> Allocate:
    """Return a function that allocates files mapped into memory, which the system writes to disk as it needs room.

    The files are unlinked once they are mapped, so that nothing is left when the process ends, in whatever way.

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
            # Take the room now: a disk that is full later would kill the process by a signal.
            try:
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
                else:
                    os.truncate(file.fileno(), count * dtype.itemsize)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"Argument `offload` expected room for the shard states in '{folder}', but got: {error.strerror}. "
                    "Give another folder as the trainer's `default_root_dir`, or use offload='cpu'.",
                ) from error
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)

    return allocate


def estimate_state_bytes(layout: FlatLayout) -> int:
    """Return the bytes of one shard's state, with the two moments of Adam, which exist from the first step on."""
    return layout.nbytes + 2 * sum(length * dtype.itemsize for dtype, length in layout.first_lengths.items())


def choose_offload(needed: int, *, device: torch.device, device_free: int, host_free: int) -> Offload:
    """Return the first of device, host and disk that has room: all states in half of its free memory *(our choice)*.

    Args:
        needed: Bytes of all states of the process but the active one.
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


def make_storage(trainer: Trainer, layout: FlatLayout, flat: Flat, *, num_hosted: int, offload: Offload) -> Storage:
    """Choose where shard states are stored, and log the decision.

    Args:
        trainer: Its ``default_root_dir`` takes the files of ``"disk"``.
        layout: Layout of the model.
        flat: Flat tensors at which the model points.
        num_hosted: Number of shards of this process.
        offload: What the user asked for.

    Raises:
        ValueError: For ``"disk"``, if the folder cannot be written.
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
        return Offloaded(flat, host_memory(device))
    folder = Path(trainer.default_root_dir)
    remedy = "Give another one as the trainer's `default_root_dir`, or use offload='cpu'."
    check_writable(folder, argument="offload", remedy=remedy)
    return Offloaded(flat, mapped_memory(folder))
