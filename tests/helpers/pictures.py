"""Image files for tests."""

import struct
import zlib
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


def png_of_16_bits(image):
    """The bytes of a PNG file of 16 bits, which Pillow writes of grey images only: (H, W, 1 to 4), uint16."""
    height, width, channels = image.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def to_bytes(tensor):
    """A tensor ``(C, H, W)`` in [0, 1] as 8-bit pixels ``(H, W, C)``, grey ones ``(H, W)``."""
    array = (tensor * 255).round().byte().permute(1, 2, 0).numpy()
    return array[..., 0] if array.shape[2] == 1 else array
