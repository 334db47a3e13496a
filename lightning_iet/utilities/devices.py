"""Where a program computes: on which device, how precisely, and on how many threads of the CPU."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

resource: ModuleType | None
try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None


def usable_device(name: str) -> str:
    """Resolve ``"auto"``, and refuse a device that is not there, before any work is done.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` …, or ``"auto"`` for a GPU if there is one.

    Raises:
        ValueError: if there is no such device.

    Example:
        >>> usable_device("cpu")
        'cpu'
        >>> usable_device("abacus")
        Traceback (most recent call last):
        ...
        ValueError: Argument `device` expected a device of this machine, such as cpu, but got 'abacus'.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # as torch says that there is none
        raise ValueError(
            f"Argument `device` expected a device of this machine, such as cpu, but got '{name}'."
        ) from error
    return name


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Switch autocast, TF32 and bfloat16 off for the matrix products of a ``with`` block.

    They keep 7 to 10 bits, which is enough for training, and too little for the distance of a copy.

    Example:
        >>> a = torch.full((1, 1), 1 / 3)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     rounded = a @ a
        ...     with full_precision("cpu"):
        ...         exact = a @ a
        >>> rounded.float(), exact
        (tensor([[0.1113]]), tensor([[0.1111]]))
    """
    with torch.autocast(device_type, enabled=False), ExitStack() as restore:
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
                restore.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
                switch.fp32_precision = "ieee"
        else:  # before torch 2.9: one switch for all backends
            restore.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


# --- threads: what the user has set, one for small networks, the share of each of several jobs ------------------------

SMALL = 1e9
"""Multiply-adds of a batch, as :func:`multiply_adds` counts them, below which a step is not divided among threads *(our
choice: alone, two threads take 0.96 of the time of one at the digits' 0.57e9, and 0.67 at 2.3e9)*."""
_VARIABLES = ("MKL_NUM_THREADS", "OMP_NUM_THREADS")  # torch follows the first of them that is set
_SHARE = "LIGHTNING_IET_THREADS"  # what this package, and not the user, has set OMP_NUM_THREADS of a job to


def user_threads() -> int | None:
    """Return the number of threads that the user has set in the environment; ``None`` = none.

    Example:
        >>> from unittest.mock import patch
        >>> with patch.dict(os.environ, {"OMP_NUM_THREADS": "3"}, clear=True):
        ...     user_threads()
        3
    """
    for name in _VARIABLES:
        number = os.environ.get(name, "").partition(",")[0].strip()  # of nested levels the first counts
        if number.isdecimal() and int(number) > 0 and (name, number) != ("OMP_NUM_THREADS", os.environ.get(_SHARE)):
            return int(number)
    return None


def threads_of_a_job(number: int) -> int:
    """Return the threads of each of a number of jobs at a time: what the user has set, else a part of the cores.

    Example:
        >>> threads_of_a_job(1000)
        1
    """
    cores = int(os.environ.get(_SHARE) or os.cpu_count() or 1)  # a job's own jobs divide its share
    return user_threads() or max(1, cores // number)


def environment_of_a_job(number: int) -> dict[str, str]:
    """Return the environment for the program of one of a number of jobs at a time, with its share of the cores."""
    if user_threads() is not None:
        return dict(os.environ)
    share = str(threads_of_a_job(number))
    return {**os.environ, "OMP_NUM_THREADS": share, _SHARE: share}


def become_a_job(threads: int) -> None:
    """Take a share of the cores in this process, which serves one of several jobs."""
    if user_threads() is None:
        os.environ |= {"OMP_NUM_THREADS": str(threads), _SHARE: str(threads)}
    torch.set_num_threads(threads)


def multiply_adds(module: nn.Module, batch_size: Any) -> float | None:
    """Return a bound of the multiply-adds of a batch in a forward pass; ``None`` where the images' size is not known.

    It is each parameter once for every pixel of every image, which convolutions at full size come to; those at lower
    resolutions take less.

    Args:
        module: With ``image_shape``, as the modules of this package have it. Its average ``ema`` does not count.
        batch_size: Images in a batch, if that is known.

    Example:
        >>> module = nn.Linear(9, 1)
        >>> module.image_shape = (3, 8, 8)
        >>> multiply_adds(module, 2)
        1280.0
    """
    try:
        _, height, width = module.image_shape  # type: ignore[misc]
    except (AttributeError, TypeError, ValueError):  # the denoiser does not tell
        return None
    if not isinstance(batch_size, int):
        return None
    ema = getattr(module, "ema", None)
    averaged = {id(parameter) for parameter in ema.parameters()} if isinstance(ema, nn.Module) else set()
    parameters = sum(parameter.numel() for parameter in module.parameters() if id(parameter) not in averaged)
    return float(parameters) * int(height) * int(width) * batch_size


def is_small(module: nn.Module, batch_size: Any) -> bool:
    """Whether a training step is too small to be divided among threads; where its size is not known, it is not."""
    size = multiply_adds(module, batch_size)
    return size is not None and size < SMALL


@contextmanager
def training_threads(module: nn.Module, batch_size: Any, device: torch.device) -> Iterator[int | None]:
    """Train a small network on one thread inside a ``with`` block, unless the user has set a number.

    Threads wait for each other after every operation. In a small step that takes as long as the work, and far longer
    where another program wants one of the cores. The choice depends on the size of a step alone, not on its measured
    time: the last bits of the weights depend on the number of threads, and must not depend on what else a machine does.

    Args:
        module: What is trained.
        batch_size: Images in a batch, if that is known.
        device: Where; on an accelerator the threads of the CPU stay as many as they are.

    Yields:
        1, or ``None`` where all threads stay.

    Example:
        >>> with training_threads(nn.Linear(1, 1), 4, torch.device("cpu")) as chosen:
        ...     chosen is None  # nothing is known of the images
        True
    """
    before = torch.get_num_threads()
    if before == 1 or user_threads() is not None or device.type != "cpu" or not is_small(module, batch_size):
        yield None
        return
    torch.set_num_threads(1)
    try:
        yield 1
    finally:
        torch.set_num_threads(before)


def peak_memory() -> int:
    """Bytes that this process has had in memory at most; 0 where the system does not tell."""
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
