"""The Inception network that the Fréchet distance was defined with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_iet.metrics.features.base import FeatureNetwork, PathLike_, load_weights, rgb_images
from lightning_iet.metrics.features.torchscript import load_torchscript
from lightning_iet.utilities.errors import require

_CLEAN_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"


class InceptionFeatures(FeatureNetwork):
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

    def __init__(self, weights: PathLike_ | None = None, *, download: bool = False) -> None:
        super().__init__()
        url = require("torch_fidelity.feature_extractor_inceptionv3", "inception").URL_INCEPTION_V3
        from torchmetrics.image.fid import NoTrainInceptionV3  # a stub, unless torch-fidelity is there

        remedy = f"Get {url} and pass its path as `weights`, or pass download=True."
        if weights is None and not download:
            raise FileNotFoundError(f"Argument `weights` expected Inception's weight file, but got None. {remedy}")
        if weights is not None:
            load_weights(Path(weights), "Inception", remedy)  # once, because torch-fidelity unpickles it in full
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
        self.freeze()

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
        return self.network(_levels(images))


class CleanInceptionFeatures(FeatureNetwork):
    """The 2,048 pooled features of Inception as clean-fid computes them (Parmar et al., CVPR 2022, arXiv:2104.11222).

    Each channel is resized to 299x299 by clean-fid's own function (Pillow, bicubic, antialiased, not rounded), and
    scaled to ``(x - 128) / 128`` with x in [0, 255]. Grey images have their channel repeated, as clean-fid does.

    Args:
        weights: ``inception-2015-12-05.pt``, the TorchScript file that clean-fid uses. It is never downloaded.

    Raises:
        ModuleNotFoundError: if clean-fid is not installed.
        FileNotFoundError: if ``weights`` is not given, or is missing.
        ValueError: if it is no TorchScript file, or that of another network.
    """

    num_features = 2048

    def __init__(self, weights: PathLike_ | None = None) -> None:
        super().__init__()
        self.resize = require("cleanfid.resize", "inception").build_resizer("clean")
        remedy = f"Get {_CLEAN_URL} and pass its path as `weights`."
        if weights is None:
            raise FileNotFoundError(f"Argument `weights` expected Inception's TorchScript file, but got None. {remedy}")
        network = load_torchscript(weights, remedy)
        if not hasattr(network, "layers"):
            raise ValueError(
                f"Argument `weights` expected Inception's TorchScript file, but got {weights}, "
                f"which holds another network. {remedy}"
            )
        self.weights = weights
        self.network: nn.Module = network.layers  # type: ignore[assignment]
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Map images to features.

        Args:
            images: shape ``(N, 3, H, W)`` or ``(N, 1, H, W)``; uint8, or floating point in [0, 1], which is rounded to
                256 levels *(our choice: as files have them)*.

        Returns:
            Shape ``(N, 2048)``.

        Raises:
            TypeError: as :class:`InceptionFeatures`.
            ValueError: as :class:`InceptionFeatures`.
        """
        arrays = [self.resize(image.permute(1, 2, 0).numpy()) for image in _levels(images).cpu()]
        pixels = torch.stack([torch.from_numpy(array) for array in arrays]).permute(0, 3, 1, 2).to(images.device)
        return self.network(((pixels - 128) / 128).to(self.dtype)).flatten(1)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.weights,)  # TorchScript modules cannot be pickled


def _levels(images: Tensor) -> Tensor:
    """RGB images of 256 levels."""
    rgb = rgb_images(images)
    return rgb if rgb.dtype == torch.uint8 else (rgb * 255).round().byte()
