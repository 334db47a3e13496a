"""Features for scikit-learn's 8x8 digits; their network is shipped with this package."""

from importlib.resources import as_file, files
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_iet.functional.checks import image_rows, unit_interval
from lightning_iet.metrics.features.base import FeatureNetwork, PathLike_, check_file


class DigitsClassifier(nn.Module):
    """A small convolutional classifier of 8x8 digits, 59,000 parameters, trained by scripts/train_digits_features.py.

    Normalisation is by group, so that the network does the same in training and in evaluation mode.

    Args:
        num_features: width of the penultimate layer.

    Example:
        >>> import torch
        >>> DigitsClassifier()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_features: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(1, 32),
            *_convolution(32, 48),
            nn.MaxPool2d(2),
            *_convolution(48, 64),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 2 * 2, num_features),
            nn.SiLU(),
        )
        self.head = nn.Linear(num_features, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images in [0, 1], shape ``(N, 1, 8, 8)``, to logits, shape ``(N, 10)``."""
        return self.head(self.body(images))


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.GroupNorm(8, channels_out), nn.SiLU()]


class DigitsFeatures(FeatureNetwork):
    """Penultimate features of a classifier of scikit-learn's 8x8 digits, for a Fréchet distance that knows digits.

    Inception judges photographs of 299x299 pixels; on digits of 8x8 it is the wrong judge.

    Args:
        weights: a safetensors file for :class:`DigitsClassifier`; by default the one in this package.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it holds something else.

    Example:
        >>> import torch
        >>> DigitsFeatures()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 64])
    """

    num_features = 64

    def __init__(self, weights: PathLike_ | None = None) -> None:
        super().__init__()
        self.classifier = DigitsClassifier(self.num_features)
        if weights is None:
            with as_file(files("lightning_iet.metrics") / "weights" / "digits_features.safetensors") as shipped:
                _load_safetensors(self.classifier, shipped)
        else:
            _load_safetensors(self.classifier, Path(weights))
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Map images to features.

        Args:
            images: shape ``(N, 1, 8, 8)``, uint8 or floating point in [0, 1].

        Returns:
            Shape ``(N, 64)``.

        Raises:
            TypeError: if ``images`` is no tensor, or neither uint8 nor floating point.
            ValueError: if the shape differs, or values lie outside [0, 1].
        """
        rows = unit_interval(image_rows(images))
        if images.shape[1:] != (1, 8, 8):
            raise ValueError(
                f"Argument `images` expected shape (N, 1, 8, 8), but got {tuple(images.shape)}. "
                "The digits features are for 8x8 grey images; choose another feature network for these."
            )
        return self.classifier.body(rows.to(self.dtype).reshape(images.shape))


def _load_safetensors(module: nn.Module, path: Path) -> None:
    remedy = "Leave it out for the shipped weights, or train your own by scripts/train_digits_features.py."
    check_file(path, remedy)
    try:
        module.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError):
        raise ValueError(
            f"Argument `weights` expected a safetensors file for {type(module).__name__}, but got {path}, which holds "
            f"something else. {remedy}"
        ) from None
