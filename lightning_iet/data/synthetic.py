"""Random images in the place of real ones, to try a configuration on a machine without the data."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iet.data.decoding import Size
from lightning_iet.functional.seeding import derive_seed

__all__ = ["SyntheticImages"]


class SyntheticImages(Dataset[tuple[Tensor, Any]]):
    """Uniform noise; yields ``(image, condition)``, drawn when it is read.

    Args:
        num: Number of images.
        channels: Of each image.
        size: Height and width.
        num_classes: Classes in equal shares, as ``targets``; ``None`` = no labels.
        captioned: Whether images have captions instead.
        seed: Of all images.

    Example:
        >>> images = SyntheticImages(6, channels=3, size=(8, 4), num_classes=3)
        >>> images[1][0].shape, images.targets
        (torch.Size([3, 8, 4]), tensor([0, 1, 2, 0, 1, 2]))
        >>> SyntheticImages(6, channels=3, size=(8, 4), captioned=True)[1][1]
        'synthetic image 1'
    """

    targets: Tensor

    def __init__(
        self,
        num: int,
        *,
        channels: int,
        size: Size,
        num_classes: int | None = None,
        captioned: bool = False,
        seed: int = 0,
    ) -> None:
        self.num = num
        self.shape = (channels, *size)
        self.captioned = captioned
        self.seed = seed
        if num_classes is not None and not captioned:
            self.targets = torch.arange(num) % num_classes

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, index))
        image = torch.rand(self.shape, generator=generator)
        return image, f"synthetic image {index}" if self.captioned else 0
