"""Small sets of images for tests of the audit."""

import numpy as np
import torch
from PIL import Image

from lightning_iet.audit.reading import image_set

NASTY = "<script>alert(1)</script>\"'\n\udcff&amp;.png"


def random_pixels(count, *, seed=0, channels=1, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def random_set(count, *, seed=0, name="images", **shape):
    return image_set(random_pixels(count, seed=seed, **shape), location=name)


def write_images(folder, pixels, *, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pixels, start):
        array = np.asarray(image.permute(1, 2, 0))
        Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(folder / f"{number:05d}.png")
    return folder
