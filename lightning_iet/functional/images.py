"""Images as rows of numbers in [0, 1], and a clear word where they are something else."""

import torch
from torch import Tensor

__all__ = ["image_rows", "unit_interval"]


def image_rows(images: Tensor, *, name: str = "images") -> Tensor:
    """Check a batch of images and flatten each of them to one row.

    Args:
        images: shape ``(N, ...)``, uint8, or floating point in [0, 1].
        name: what error messages call the argument.

    Returns:
        Shape ``(N, D)``; uint8 stays uint8 (a quarter of the memory), every floating type becomes float32.

    Raises:
        TypeError: if ``images`` is no tensor, or neither uint8 nor floating point.
        ValueError: if there is no dimension to flatten, or a value is NaN or outside [0, 1].

    Example:
        >>> image_rows(torch.tensor([[[0.0, 0.5], [1.0, 0.25]]]))
        tensor([[0.0000, 0.5000, 1.0000, 0.2500]])
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"Argument `{name}` expected a tensor, but got {type(images).__name__}. Convert it by torch.as_tensor."
        )
    if images.ndim < 2:
        raise ValueError(
            f"Argument `{name}` expected shape (N, C, H, W), but got {tuple(images.shape)}. "
            "Add the missing dimensions, e.g. by images[None] for a single image."
        )
    if images.dtype != torch.uint8:
        _check_unit_interval(images, name)
        images = images.to(torch.float32)
    return images.flatten(1)


def _check_unit_interval(images: Tensor, name: str) -> None:
    if not images.is_floating_point():
        raise TypeError(
            f"Argument `{name}` expected dtype uint8 or floating point, but got {images.dtype}. "
            "Convert the images by .to(torch.uint8)."
        )
    if images.numel() == 0:
        return
    low, high = (value.item() for value in images.aminmax())
    if not (low >= 0 and high <= 1):  # written so that NaN, which compares false, is refused as well
        found = "NaN" if low != low else f"values from {low:.4g} to {high:.4g}"
        raise ValueError(
            f"Argument `{name}` expected values in [0, 1], but got {found}. "
            "Scale them, e.g. by ((images + 1) / 2).clamp(0, 1), or pass uint8."
        )


def unit_interval(images: Tensor) -> Tensor:
    """Return images in [0, 1]: uint8 divided by 255, in float32; floating point as it is.

    Args:
        images: any shape, uint8 or floating point.

    Returns:
        The same shape.

    Example:
        >>> unit_interval(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([0.0000, 0.2000, 1.0000])
    """
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images
