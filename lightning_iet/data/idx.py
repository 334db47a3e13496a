"""The idx files of the MNIST family: a header with type and shape, then bytes."""

import gzip
import math
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["find_idx", "read_idx"]


def find_idx(folder: Path, name: str) -> Path | None:
    """The file of a name, plain or compressed by gzip; ``None`` if there is none."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path) -> Tensor:
    """Read an idx file of unsigned bytes.

    Layout: two zero bytes, the type (8 = unsigned byte), the number of dimensions, each dimension as a big-endian
    32-bit integer, the values. See https://yann.lecun.com/exdb/mnist/.

    Args:
        path: The file, compressed by gzip if its name ends in ``.gz``.

    Returns:
        uint8, of the shape that the header says.

    Raises:
        ValueError: If it is something else, or damaged.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:  # gzip raises both for damaged files
        raise _broken(path, str(error)) from error
    if data[:3] != b"\x00\x00\x08" or len(data) < 4:
        raise _broken(path, "its header is another")
    dimensions = data[3]
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    if len(data) - start != math.prod(shape):
        raise _broken(path, f"its header promises {math.prod(shape)} bytes, it has {max(len(data) - start, 0)}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).view(shape)


def _broken(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"Argument `root` expected idx files, but got '{path}', which is none or damaged ({reason}). Fetch it again."
    )
