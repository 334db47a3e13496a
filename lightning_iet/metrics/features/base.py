"""What the feature networks share: files of weights, preprocessing, embedding in batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from lightning_iet.functional.checks import image_rows, unit_interval
from lightning_iet.utilities.devices import full_precision

PathLike_ = str | PathLike[str]


def check_file(path: Path, remedy: str) -> None:
    """Raise a FileNotFoundError with the remedy if there is no such weight file."""
    if not path.is_file():
        raise FileNotFoundError(f"Argument `weights` expected an existing file, but got {path}. {remedy}")


def load_weights(path: Path, network: str, remedy: str) -> dict[str, Tensor]:
    """Read a state dict that torch saved, to the CPU, without running any code that is hidden in the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else than the network's weights.
    """
    check_file(path, remedy)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises whatever the bytes provoke
        raise ValueError(
            f"Argument `weights` expected {network}'s weight file, but got {path}, "
            f"which is no file of weights. {remedy}"
        ) from None


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
    """
    rows = image_rows(images)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"Argument `images` expected shape (N, 3, H, W) or (N, 1, H, W), but got {tuple(images.shape)}. "
            "Convert the images to RGB."
        )
    return rows.reshape(images.shape).expand(-1, 3, -1, -1)


def resized(images: Tensor, size: int | tuple[int, int], *, bicubic: bool = False) -> Tensor:
    """Resize images ``(N, 3, H, W)`` in [0, 1] with antialiasing, as Pillow does; one size is the shorter edge."""
    mode = transforms.InterpolationMode.BICUBIC if bicubic else transforms.InterpolationMode.BILINEAR
    new_size = [size] if isinstance(size, int) else list(size)
    return transforms.resize(unit_interval(images), new_size, interpolation=mode, antialias=True).clamp(0, 1)


def normalized(
    images: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Tensor:
    """Subtract a mean from every channel and divide it by a standard deviation, by default ImageNet's."""
    return transforms.normalize(images, list(mean), list(std))


@torch.no_grad()
def embed_images(features: nn.Module, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Map images to feature vectors, in float32 whatever the precision around, and in memory for one batch.

    The network runs in evaluation mode, without dropout and without learning statistics; afterwards each of its modules
    is in the mode that it was in.

    Args:
        features: the network; its batches run where its parameters are.
        images: shape ``(N, C, H, W)``, uint8 or floating point in [0, 1].
        batch_size: images per batch.

    Returns:
        Shape ``(N, D)``, float32, where ``images`` are. ``(0, 0)`` for no images, whose width is unknown.

    Raises:
        ValueError: if a feature is NaN or infinite.

    Example:
        >>> embed_images(nn.Flatten(), torch.zeros(3, 1, 4, 4)).shape
        torch.Size([3, 16])
    """
    if len(images) == 0:
        return torch.zeros(0, 0, device=images.device)
    parameter = next(features.parameters(), images)
    with _evaluation_mode(features), full_precision(parameter.device.type):
        batches = (features(batch.to(parameter.device)) for batch in images.split(batch_size))
        rows = torch.cat([batch.flatten(1).to(images.device, torch.float32) for batch in batches])
    broken = ~rows.isfinite().all(dim=1)
    if broken.any():
        raise ValueError(
            f"Argument `features` expected a network with finite features, but got NaN or infinity for "
            f"{broken.sum()} of {len(images)} images, the first of index {broken.int().argmax()}. "
            "Look at that image, and at the weights."
        )
    return rows


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    training = [module for module in network.modules() if getattr(module, "training", False)]  # TorchScript may lack it
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
