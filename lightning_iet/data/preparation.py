"""From what a source yields to a tensor to train on: decoded, of one size, with as many channels as asked for."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lightning_iet.data.decoding import Fit, Size, decode

__all__ = ["Channels", "Preparation", "to_channels"]

Channels: TypeAlias = Literal[1, 3, 4]


@dataclass(frozen=True)
class Preparation:
    """Turns one image into a tensor, float32 in [0, 1], shape ``(C, H, W)``.

    Files, arrays and Pillow's images are decoded by the rules of :mod:`lightning_iet.data.decoding`, those by which an
    audit reads them. Sizes are changed by a bicubic filter with antialiasing.

    Args:
        channels: 1 for grey, 3 for colour, 4 for colour with transparency.
        size: Height and width; ``None`` leaves the size.
        fit: ``"crop"`` scales the image until it covers the size and takes the middle; ``"stretch"`` changes its
            proportions.

    Example:
        >>> prepare = Preparation(channels=3, size=(4, 4))
        >>> prepare(torch.full((1, 8, 6), 255, dtype=torch.uint8)).shape
        torch.Size([3, 4, 4])
    """

    channels: Channels
    size: Size | None = None
    fit: Fit = "crop"

    def __call__(self, image: Any) -> Tensor:
        """Prepare a tensor ``(C, H, W)``, or anything that :func:`~lightning_iet.data.decoding.decode` reads."""
        if not isinstance(image, Tensor):
            image = torch.tensor(decode(image, alpha=self.channels == 4)).permute(2, 0, 1)
        if self.size is not None and tuple(image.shape[-2:]) != self.size:
            image = _resize(image, self.size, self.fit)
        return to_channels(F.to_dtype(image, torch.float32, scale=True), self.channels)


def _resize(image: Tensor, size: Size, fit: Fit) -> Tensor:
    target = size
    if fit == "crop":
        height, width = image.shape[-2:]
        scale = max(size[0] / height, size[1] / width)
        target = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    resized = F.resize(image, list(target), interpolation=InterpolationMode.BICUBIC, antialias=True)
    # Cubic weights are negative in places: floating point can leave [0, 1], 8 bits cannot.
    resized = resized.clamp(0, 1) if resized.is_floating_point() else resized
    return F.center_crop(resized, list(size))


def to_channels(image: Tensor, channels: Channels) -> Tensor:
    """Give an image another number of channels.

    Args:
        image: Float in [0, 1], shape ``(C, H, W)`` with 1, 3 or 4 channels.
        channels: How many it shall have. Transparency is laid over white, colours become grey by ITU-R 601's weights,
            and what had no transparency is opaque.

    Returns:
        Shape ``(channels, H, W)``.

    Raises:
        ValueError: If the image has another number of channels.

    Example:
        >>> image = torch.tensor([1.0, 0, 0, 0.5]).view(4, 1, 1)  # half of a red
        >>> to_channels(image, 3).flatten(), to_channels(image, 1).shape
        (tensor([1.0000, 0.5000, 0.5000]), torch.Size([1, 1, 1]))
    """
    if len(image) == channels:
        return image
    if len(image) not in (1, 3, 4):
        raise ValueError(f"an image has 1, 3 or 4 channels, not {len(image)}")
    if len(image) == 4:
        image = 1 - image[3:] * (1 - image[:3])
    if channels == 1:
        return F.rgb_to_grayscale(image)
    colours = image.expand(3, -1, -1)
    return colours if channels == 3 else torch.cat([colours, torch.ones_like(image[:1])])
