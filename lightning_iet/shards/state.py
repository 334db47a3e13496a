"""The states of shards: what they hold, and where they lie: on the device, in host memory, or on disk."""

import copy
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import psutil
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_iet.shards.layout import FlatLayout
from lightning_iet.utilities.files import check_writable


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

    Tensors are not copied; parameters become their numbers in the order of the optimizers' groups.
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
    """Return the state that :func:`pack` was given, on the device where the model is trained.

    The flat tensors of ``into``, a state of the same model, are overwritten and used; they stay where they are.
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


Flat = dict[torch.dtype, Tensor]
Allocate = Callable[[torch.Size, torch.dtype], Tensor]
Offload = Literal["auto", "none", "cpu", "disk"]

SMALLEST_FILE = 1 << 16  # bytes; counters and biases stay in memory
SHARE = 0.5  # of the free memory; the rest is for activations and data


class Storage:
    """Keeps all states of shards on the device: activating one exchanges references and copies nothing."""

    keeps_tensors = True
    """Whether a stored state consists of the very tensors that were given."""

    def store(self, shard: int, state: ShardState) -> ShardState:
        """Return a state that does not change while other shards are active; the one passed may be used up."""
        return state

    def load(self, state: ShardState) -> ShardState:
        """Return a stored state on the device."""
        return state

    def load_flat(self, flat: Flat) -> Flat:
        """Do the same for flat tensors alone; what :meth:`load` returned before may be overwritten."""
        return flat

    def empty(self, layout: FlatLayout) -> Flat:
        """Return uninitialised memory for flat tensors, where the states are stored."""
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
    """Choose where shard states are stored, and log the decision; files of ``"disk"`` go to ``default_root_dir``.

    Raises:
        ValueError: For ``"disk"``, if the folder cannot be written.
    """
    if num_hosted == 1:
        return Storage()
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
        return Storage()
    if choice == "cpu":
        return Offloaded(flat, host_memory(device))
    folder = Path(trainer.default_root_dir)
    remedy = "Give another one as the trainer's `default_root_dir`, or use offload='cpu'."
    check_writable(folder, argument="offload", remedy=remedy)
    return Offloaded(flat, mapped_memory(folder))
