"""Feature networks for the Fréchet distance: one for 8x8 digits, shipped here, and Inception."""

from importlib.resources import as_file, files
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_iet.functional.images import image_rows, unit_interval
from lightning_iet.utilities.imports import require

__all__ = ["DigitsClassifier", "DigitsFeatures", "InceptionFeatures", "feature_extractor"]

Path_ = str | PathLike[str]


class DigitsClassifier(nn.Module):
    """A small convolutional classifier of 8x8 digits, 59,000 parameters, trained by scripts/train_digits_features.py.

    Normalisation is by group, so that the network does the same in training and in evaluation mode.

    Args:
        num_features: width of the penultimate layer.

    Example:
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


class DigitsFeatures(nn.Module):
    """Penultimate features of a classifier of scikit-learn's 8x8 digits, for a Fréchet distance that knows digits.

    Inception judges photographs of 299x299 pixels; on digits of 8x8 it is the wrong judge.

    Args:
        weights: a safetensors file for :class:`DigitsClassifier`; by default the one in this package.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it holds something else.

    Example:
        >>> DigitsFeatures()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 64])
    """

    num_features = 64

    def __init__(self, weights: Path_ | None = None) -> None:
        super().__init__()
        self.classifier = DigitsClassifier(self.num_features)
        if weights is None:
            with as_file(files("lightning_iet.metrics") / "weights" / "digits_features.safetensors") as shipped:
                _load_safetensors(self.classifier, shipped)
        else:
            _load_safetensors(self.classifier, Path(weights))
        self.requires_grad_(False).eval()

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
        return self.classifier.body(rows.to(self.classifier.head.weight.dtype).reshape(images.shape))


def _load_safetensors(module: nn.Module, path: Path) -> None:
    remedy = "Leave it out for the shipped weights, or train your own by scripts/train_digits_features.py."
    _check_file(path, remedy)
    try:
        module.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError):
        raise ValueError(
            f"Argument `weights` expected a safetensors file for {type(module).__name__}, but got {path}, which holds "
            f"something else. {remedy}"
        ) from None


def _check_file(path: Path, remedy: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"Argument `weights` expected an existing file, but got {path}. {remedy}")


class InceptionFeatures(nn.Module):
    """The 2,048 pooled features of the Inception network that FID was defined with, computed by torchmetrics.

    Args:
        weights: the network's weight file, see :func:`feature_extractor`.
        download: fetch the weights where ``weights`` is not given.

    Raises:
        ModuleNotFoundError: if torch-fidelity, which defines the network, is not installed.
        FileNotFoundError: if the file is missing, or neither ``weights`` nor ``download`` is given.
        ConnectionError: if the download fails.
        ValueError: if the file holds something else.
    """

    num_features = 2048

    def __init__(self, weights: Path_ | None = None, *, download: bool = False) -> None:
        super().__init__()
        url = require("torch_fidelity.feature_extractor_inceptionv3", "inception").URL_INCEPTION_V3
        from torchmetrics.image.fid import NoTrainInceptionV3  # a stub, unless torch-fidelity is there

        remedy = f"Get {url} and pass its path as `weights`, or pass download=True."
        if weights is None and not download:
            raise FileNotFoundError(f"Argument `weights` expected Inception's weight file, but got None. {remedy}")
        if weights is not None:
            _check_inception(Path(weights), remedy)
        try:
            self.network = NoTrainInceptionV3(
                "inception-v3-compat", [str(self.num_features)], None if weights is None else str(weights)
            )
        except (OSError, RuntimeError, TypeError) as error:
            if weights is None:
                raise ConnectionError(f"Inception's weights could not be downloaded ({error}). {remedy}") from None
            raise ValueError(
                f"Argument `weights` expected Inception's weight file, but got {weights}, "
                f"which holds another network's. {remedy}"
            ) from None

    def forward(self, images: Tensor) -> Tensor:
        """Map images to features.

        Args:
            images: shape ``(N, 3, H, W)``, or ``(N, 1, H, W)`` for grey images, whose channel is repeated *(our
                choice)*; uint8, or floating point in [0, 1], which is rounded to 256 levels *(our choice: as files
                have them; torchmetrics' own ``normalize=True`` rounds down)*.

        Returns:
            Shape ``(N, 2048)``.

        Raises:
            TypeError: if ``images`` is no tensor, or neither uint8 nor floating point.
            ValueError: if the shape differs, or values lie outside [0, 1].
        """
        image_rows(images)
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"Argument `images` expected shape (N, 3, H, W) or (N, 1, H, W), but got {tuple(images.shape)}. "
                "Convert the images to RGB."
            )
        pixels = images if images.dtype == torch.uint8 else (images * 255).round().byte()
        return self.network(pixels.expand(-1, 3, -1, -1))


def _check_inception(path: Path, remedy: str) -> None:
    """Read the file once without running any code in it, because torch-fidelity unpickles it in full."""
    _check_file(path, remedy)
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises whatever the bytes provoke
        raise ValueError(
            f"Argument `weights` expected Inception's weight file, but got {path}, "
            f"which is no file of weights. {remedy}"
        ) from None


def feature_extractor(name: str, *, weights: Path_ | None = None, download: bool = False) -> nn.Module:
    """Build a frozen feature network by name.

    Args:
        name: ``"digits"``, for 8x8 grey digits, or ``"inception"``, for photographs.
        weights: the network's weight file. ``"digits"`` brings its own; ``"inception"`` needs
            ``weights-inception-2015-12-05-6726825d.pth`` from torch-fidelity's releases, unless ``download``.
        download: let ``"inception"`` fetch its weights. Nothing is ever downloaded otherwise.

    Returns:
        A module that maps images, uint8 or floating point in [0, 1], to features ``(N, num_features)``.

    Raises:
        ValueError: if there is no network of that name, or the weight file holds something else.
        FileNotFoundError: if the weight file is missing.
        ModuleNotFoundError: if ``"inception"`` is asked for without torch-fidelity.
        ConnectionError: if the download fails.

    Example:
        >>> feature_extractor("digits").num_features
        64
    """
    if name == "digits":
        return DigitsFeatures(weights)
    if name == "inception":
        return InceptionFeatures(weights, download=download)
    raise ValueError(
        f"Argument `name` expected 'digits' or 'inception', but got {name!r}. "
        "For a network of your own, pass the module itself to frechet_distance."
    )
