"""A set of images that was read, and what was left out of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_iet.audit.cache import digest
from lightning_iet.data.skips import Skip

__all__ = ["ImageSet", "image_set"]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in memory.

    Attributes:
        pixels: uint8, shape ``(N, C, H, W)``, grey or RGB.
        names: one for each.
        location: where they come from, for people.
        sha256: hash of their content and their order.
        skipped: what could not be read, beside the ``N``.
    """

    pixels: Tensor
    names: Sequence[str]
    location: str
    sha256: str
    skipped: Sequence[Skip] = field(default=())

    def __len__(self) -> int:
        return len(self.pixels)


def image_set(pixels: Tensor, *, location: str) -> ImageSet:
    """Wrap images that are in memory already, such as those that a model has just drawn.

    Args:
        pixels: uint8, shape ``(N, C, H, W)``, grey or RGB.
        location: where they come from, for people.

    Returns:
        The set; its images are named by their position.

    Example:
        >>> import torch
        >>> image_set(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), location="zeros").names
        ['0', '1']
    """
    names = [str(index) for index in range(len(pixels))]
    sha256 = digest(*pixels.shape, *(image.numpy().tobytes() for image in pixels.cpu()))
    return ImageSet(pixels=pixels, names=names, location=location, sha256=sha256)
