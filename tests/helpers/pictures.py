"""Image files for tests."""

from io import BytesIO

import numpy as np
from PIL import Image


def pixels(number=1, size=(8, 8), channels=3, seed=0):
    """Random 8-bit images, shape ``(number, H, W, channels)``; grey ones have no last dimension."""
    shape = (number, *size) if channels == 1 else (number, *size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_pictures(folder, names, **kwargs):
    """Write one random image per name; returns their pixels by name."""
    drawn = dict(zip(names, pixels(len(names), **kwargs), strict=True))
    for name, image in drawn.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return drawn


def png(image):
    """The bytes of a PNG file."""
    file = BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def to_bytes(tensor):
    """A tensor ``(C, H, W)`` in [0, 1] as 8-bit pixels ``(H, W, C)``, grey ones ``(H, W)``."""
    array = (tensor * 255).round().byte().permute(1, 2, 0).numpy()
    return array[..., 0] if array.shape[2] == 1 else array
