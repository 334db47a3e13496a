"""Weight files: there, and read without running code that is hidden in them."""

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["PathLike_", "check_file", "load_weights"]

PathLike_ = str | PathLike[str]


def check_file(path: Path, remedy: str) -> None:
    """Refuse a weight file that does not exist.

    Args:
        path: the file.
        remedy: what to do about it.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Argument `weights` expected an existing file, but got {path}. {remedy}")


def load_weights(path: Path, network: str, remedy: str) -> dict[str, Tensor]:
    """Read a state dict that torch saved, without running any code that is hidden in the file.

    Args:
        path: the file.
        network: whose weights are expected, for the message.
        remedy: what to do if it holds something else.

    Returns:
        The state dict, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
    """
    check_file(path, remedy)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises whatever the bytes provoke
        raise ValueError(
            f"Argument `weights` expected {network}'s weight file, but got {path}, "
            f"which is no file of weights. {remedy}"
        ) from None
