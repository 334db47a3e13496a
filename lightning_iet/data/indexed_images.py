"""Images in memory."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iet.functional.images import unit_interval

__all__ = ["IndexedImages"]


class IndexedImages(Dataset[tuple[Tensor, Tensor, int]]):
    """Images in memory; yields ``(image, label, index)``, the image float in [0, 1].

    Args:
        images: Float in [0, 1], or uint8, which takes a quarter of the memory; shape ``(n, C, H, W)``.
        labels: Classes, shape ``(n,)``.

    Raises:
        ValueError: If numbers disagree, or images are not in [0, 1].

    Example:
        >>> image, label, index = IndexedImages(torch.zeros(3, 1, 2, 2), torch.tensor([7, 8, 9]))[1]
        >>> image.shape, int(label), index
        (torch.Size([1, 2, 2]), 8, 1)
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                f"Argument `images` expected shape (n, C, H, W) with one label each, but got {tuple(images.shape)} "
                f"and {len(labels)} labels."
            )
        checked = len(images) > 0 and images.dtype != torch.uint8
        if checked and not (images.isfinite().all() and images.min() >= 0 and images.max() <= 1):
            raise ValueError("Argument `images` expected finite values in [0, 1], but got others. Divide 8-bit by 255.")
        self.images = images
        self.targets = labels

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return unit_interval(self.images[index]), self.targets[index], index

    def __len__(self) -> int:
        return len(self.images)
