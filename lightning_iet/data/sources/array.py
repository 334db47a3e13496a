"""Images that are one array."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ArraySource", "load_array"]


class ArraySource:
    """The images of one array.

    Args:
        array: shape ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)`` with 1, 3 or 4 channels. Where both of the
            latter fit, the channels are taken to be last.

    Raises:
        ValueError: if the shape is none of these.

    Example:
        >>> source = ArraySource(np.zeros((2, 3, 8, 8), dtype=np.uint8))
        >>> source.read(1).shape, source.name(1)
        ((8, 8, 3), '1')
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self.channels_first = array.ndim == 4 and array.shape[3] not in (1, 3, 4)
        if array.ndim not in (3, 4) or (self.channels_first and array.shape[1] not in (1, 3, 4)):
            raise ValueError(f"an array of shape {array.shape} holds no images (N, H, W), (N, H, W, C) or (N, C, H, W)")
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def name(self, index: int) -> str:
        """Position in the array."""
        return str(index)

    def read(self, index: int) -> NDArray[Any]:
        """Return one image, ``(H, W)`` or ``(H, W, C)``."""
        image = np.ascontiguousarray(self.array[index])
        return np.ascontiguousarray(image.transpose(1, 2, 0)) if self.channels_first else image


def load_array(path: Path) -> NDArray[Any]:
    """Map a .npy file into memory, or take the one array of images from a .npz file."""
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(stored, np.ndarray):
        return stored
    with stored:
        arrays = [stored[key] for key in stored.files]
    images = [array for array in arrays if array.ndim in (3, 4)]
    if len(images) != 1:
        raise ValueError(f"it holds {len(images)} arrays of 3 or 4 dimensions, not one")
    return images[0]
