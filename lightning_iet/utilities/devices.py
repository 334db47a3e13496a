"""The device that a tool works on."""

import torch

__all__ = ["usable_device"]


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
