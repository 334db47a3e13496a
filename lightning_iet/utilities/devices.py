"""The device that a tool works on, and the precision of its arithmetic."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


def usable_device(name: str) -> str:
    """Resolve ``"auto"``, and refuse a device that is not there, before any work is done.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` …, or ``"auto"`` for a GPU if there is one.

    Returns:
        The device's name.

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

    Args:
        device_type: where the products run, e.g. ``"cpu"`` or ``"cuda"``.

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
