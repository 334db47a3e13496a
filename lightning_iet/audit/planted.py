"""The positive control: copies that the audit plants itself, to see whether it finds them.

Training images go through what the generated images went through, as far as it is known (file format, size, number of
grey levels), and through the changes that the audit claims to see through. They are searched for with the rest.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lightning_iet.audit.comparability import count_levels, one_colour
from lightning_iet.audit.disguises import flipped, positions_of
from lightning_iet.audit.reading import ImageSet, image_set

Kind = Literal["exact", "mirrored", "recoloured", "degraded", "moved"]
KINDS: tuple[Kind, ...] = ("exact", "mirrored", "recoloured", "degraded", "moved")
MOST, LEAST = 20, 10  # copies of each kind
SHARE = 0.05  # of all images that are searched for
QUALITY = 75  # of a JPEG whose quality is unknown
SEED = 0
_LEFT_RIGHT = 2  # the flip that mirrors an image
_LOSSY = ("JPEG", "MPO", "WEBP")


@dataclass(frozen=True, eq=False)
class Planted:
    """Copies of training images.

    Attributes:
        images: The copies.
        sources: Positions of the training images, shape ``(P,)``.
        kinds: What was done to each.
    """

    images: ImageSet
    sources: Tensor
    kinds: tuple[Kind, ...]


def plant(train: ImageSet, like: ImageSet, *, kinds: tuple[Kind, ...], searched: int) -> Planted:
    """Make copies of training images.

    Args:
        train: The training images.
        like: The generated images, whose format, size and number of grey levels the copies share.
        kinds: What to do to them.
        searched: Number of generated and held-out images: copies are at most a twentieth of it, but at least 10 a kind.

    Returns:
        The copies, the same for the same sets.

    Example:
        >>> pixels = torch.randint(256, (30, 1, 8, 8), dtype=torch.uint8)
        >>> train = image_set(pixels, location="train")
        >>> planted = plant(train, train, kinds=("exact",), searched=100)
        >>> torch.equal(planted.images.pixels, pixels[planted.sources])
        True
    """
    count = max(LEAST, min(MOST, int(SHARE * searched / len(kinds))))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED))
    varied = order[~one_colour(train.pixels).cpu()[order]]
    order = varied if len(varied) else order  # images of one colour are copied only if there are no others
    sources, copies, names = [], [], []
    for number, kind in enumerate(kinds):
        chosen = order[(torch.arange(min(count, len(order))) + number * count) % len(order)]
        sources.append(chosen)
        copies.append(_CHANGES[kind](train.pixels[chosen]))
        names += [kind] * len(chosen)
    pixels = as_generated(torch.cat(copies), like)
    return Planted(image_set(pixels, location="planted copies"), torch.cat(sources), tuple(names))


def as_generated(pixels: Tensor, like: ImageSet) -> Tensor:
    """Pass images through what another set went through: its size before resizing, its grey levels, its format.

    Args:
        pixels: uint8, shape ``(N, C, H, W)``.
        like: The other set.

    Returns:
        The same shape.
    """
    kinds, sizes = like.origin.kinds, like.origin.sizes
    height, width = pixels.shape[2:]
    if sizes:
        stored = max(sizes, key=lambda size: sizes[size])
        smaller = int(stored.split("x")[1]), int(stored.split("x")[0])
        if smaller[0] < height and smaller[1] < width:
            small = F.interpolate(pixels.float(), smaller, mode="bicubic", antialias=True)
            pixels = _rounded(F.interpolate(small, (height, width), mode="bicubic"))
    levels = count_levels(like.pixels)
    if levels < 64:
        steps = max(levels - 1, 1)
        pixels = _rounded((pixels.float() / 255 * steps).round() / steps * 255)
    if kinds and max(kinds, key=lambda kind: kinds[kind]) in _LOSSY:
        pixels = reencode(pixels, quality=QUALITY)
    return pixels


def reencode(pixels: Tensor, *, quality: int) -> Tensor:
    """Save images as JPEG, and read them again, shape ``(N, C, H, W)``."""
    return torch.stack([_jpeg(image, quality) for image in pixels])


def _jpeg(image: Tensor, quality: int) -> Tensor:
    file, array = BytesIO(), image.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(file, "jpeg", quality=quality)
    with Image.open(file) as read:
        found = np.array(read)
    return torch.from_numpy(found.reshape(array.shape)).permute(2, 0, 1)


def _rounded(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _mirrored(pixels: Tensor) -> Tensor:
    """Mirrored, upside down, turned by right angles and with exchanged axes in turn, as far as that is searched for."""
    changes = sorted(positions_of(pixels)[1:], key=lambda number: number != _LEFT_RIGHT)
    return torch.stack([flipped(image, changes[index % len(changes)]) for index, image in enumerate(pixels)])


def _recoloured(pixels: Tensor) -> Tensor:
    """Darker, brighter, inverted, less contrast, gamma, and for colours their order, in turn."""
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda x: 0.7 * x,
        lambda x: 0.75 * x + 64,
        lambda x: 255 - x,
        lambda x: 0.5 * x + 64,
        lambda x: 255 * (x / 255) ** 1.3,
    ]
    if pixels.shape[1] == 3:
        changes.append(lambda x: x.flip(0))
    return torch.stack([_rounded(changes[index % len(changes)](x.float())) for index, x in enumerate(pixels)])


def _degraded(pixels: Tensor) -> Tensor:
    """Blurred as if a third of the pixels were left on each side, noisy, or saved as JPEG of quality 30, in turn."""
    height, width = pixels.shape[2:]
    small = F.interpolate(pixels[::3].float(), (-(-height // 3), -(-width // 3)), mode="bilinear", antialias=True)
    changed = torch.empty_like(pixels)
    changed[::3] = _rounded(F.interpolate(small, (height, width), mode="bicubic"))
    if len(pixels) > 1:
        noise = torch.randn(pixels[1::3].shape, generator=torch.Generator().manual_seed(SEED))
        changed[1::3] = _rounded(noise.mul_(16).add_(pixels[1::3]))
    if len(pixels) > 2:
        changed[2::3] = reencode(pixels[2::3], quality=30)
    return changed


def _moved(pixels: Tensor) -> Tensor:
    """Shifted by up to a tenth, turned by up to 12 degrees, or zoomed by up to 15 %, in turn."""
    aspect = pixels.shape[2] / pixels.shape[3]  # a turn is one of pixels: of coordinates from -1 to 1 it may be a shear
    generator = torch.Generator().manual_seed(SEED)
    amounts = 2 * torch.rand(len(pixels), 2, generator=generator) - 1
    maps = []
    for index, (first, second) in enumerate(amounts.tolist()):
        angle = math.radians(12 * first) if index % 3 == 1 else 0.0
        zoom = 1 + 0.15 * abs(first) if index % 3 == 2 else 1.0
        shift = (0.2 * first, 0.2 * second) if index % 3 == 0 else (0.0, 0.0)
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        maps.append([[cos, -sin * aspect, shift[0]], [sin / aspect, cos, shift[1]]])
    grid = F.affine_grid(torch.tensor(maps), list(pixels.shape), align_corners=False)
    return _rounded(F.grid_sample(pixels.float(), grid, "bicubic", "border", align_corners=False))


_CHANGES: dict[Kind, Callable[[Tensor], Tensor]] = {
    "exact": lambda pixels: pixels,
    "mirrored": _mirrored,
    "recoloured": _recoloured,
    "degraded": _degraded,
    "moved": _moved,
}
