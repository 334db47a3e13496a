"""What every feature network needs before its own preprocessing: checked images, as RGB in [0, 1]."""

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from lightning_iet.functional.images import image_rows, unit_interval

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "FeatureNetwork", "normalized", "resized", "rgb_images"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FeatureNetwork(nn.Module):
    """Base of the feature networks: frozen, and the same in training mode as in evaluation mode.

    A subclass maps images, uint8 or floating point in [0, 1], shape ``(N, C, H, W)``, to features, shape
    ``(N, num_features)``.
    """

    def freeze(self) -> None:
        """Take the gradients and the training mode away; the last call of a subclass's constructor."""
        self.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        """The type that the network calculates in: float32, unless it was converted."""
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    def train(self, mode: bool = True) -> "FeatureNetwork":
        """Stay in evaluation mode."""
        return super().train(False)


def rgb_images(images: Tensor) -> Tensor:
    """Check images and return them as RGB; the channel of grey images is repeated *(our choice)*.

    Args:
        images: shape ``(N, 3, H, W)`` or ``(N, 1, H, W)``, uint8, or floating point in [0, 1].

    Returns:
        Shape ``(N, 3, H, W)``, uint8 or float32.

    Raises:
        TypeError: if ``images`` is no tensor, or neither uint8 nor floating point.
        ValueError: if the shape differs, or values lie outside [0, 1].

    Example:
        >>> rgb_images(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    rows = image_rows(images)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"Argument `images` expected shape (N, 3, H, W) or (N, 1, H, W), but got {tuple(images.shape)}. "
            "Convert the images to RGB."
        )
    return rows.reshape(images.shape).expand(-1, 3, -1, -1)


def resized(images: Tensor, size: int | tuple[int, int], *, bicubic: bool = False) -> Tensor:
    """Resize images in [0, 1] with antialiasing, as Pillow does.

    Args:
        images: shape ``(N, 3, H, W)``, uint8 or floating point in [0, 1].
        size: the new height and width; a single number is that of the shorter edge.
        bicubic: interpolate bicubically instead of bilinearly.

    Returns:
        float32 in [0, 1].

    Example:
        >>> resized(torch.rand(2, 3, 8, 16), 4).shape
        torch.Size([2, 3, 4, 8])
    """
    mode = transforms.InterpolationMode.BICUBIC if bicubic else transforms.InterpolationMode.BILINEAR
    new_size = [size] if isinstance(size, int) else list(size)
    return transforms.resize(unit_interval(images), new_size, interpolation=mode, antialias=True).clamp(0, 1)


def normalized(
    images: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Tensor:
    """Subtract a mean from every channel and divide it by a standard deviation, by default ImageNet's.

    Args:
        images: shape ``(N, 3, H, W)``, floating point in [0, 1].
        mean: one number for each channel.
        std: one number for each channel.

    Returns:
        The same shape.

    Example:
        >>> normalized(torch.full((1, 3, 1, 1), 0.5), (0.5, 0.25, 0.0), (0.5, 0.5, 0.5)).flatten()
        tensor([0.0000, 0.5000, 1.0000])
    """
    return transforms.normalize(images, list(mean), list(std))
