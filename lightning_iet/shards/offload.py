"""The choice of where shard states lie."""

import tempfile
from pathlib import Path
from typing import Literal

import psutil
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_iet.shards.layout import FlatLayout
from lightning_iet.shards.residence import Away, Flat, OnDevice, Residence, host_memory, mapped_memory

__all__ = ["Offload", "choose_offload", "estimate_state_bytes", "make_residence"]

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
