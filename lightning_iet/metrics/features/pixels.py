"""Pixels as features."""

from torch import Tensor

from lightning_iet.functional.images import image_rows, unit_interval
from lightning_iet.metrics.features.preprocessing import FeatureNetwork

__all__ = ["PixelFeatures"]


class PixelFeatures(FeatureNetwork):
    """The pixels themselves, in [0, 1]: no network, no resizing.

    Distances of pixels are exact and owe nothing to anybody's training data, but a shift by one pixel or a change of
    brightness is far away. The number of features depends on the images, so there is no ``num_features``.

    Example:
        >>> import torch
        >>> PixelFeatures()(torch.tensor([[[[0, 51], [102, 255]]]], dtype=torch.uint8))
        tensor([[0.0000, 0.2000, 0.4000, 1.0000]])
    """

    def forward(self, images: Tensor) -> Tensor:
        """Map images, shape ``(N, C, H, W)``, to rows, shape ``(N, C * H * W)``."""
        return unit_interval(image_rows(images))
