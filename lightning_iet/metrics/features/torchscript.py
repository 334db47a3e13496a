"""Feature networks that come as one TorchScript file, SSCD among them."""

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_iet.functional.checks import unit_interval
from lightning_iet.metrics.features.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FeatureNetwork,
    PathLike_,
    check_file,
    normalized,
    resized,
    rgb_images,
)

SSCD_VARIABLE = "LIGHTNING_IET_SSCD"
_SSCD_URL = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt"


def load_torchscript(path: PathLike_, remedy: str) -> torch.nn.Module:
    """Load a TorchScript file, on the CPU.

    Args:
        path: the file.
        remedy: what to do if it is missing or something else.

    Returns:
        The module.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no TorchScript file.
    """
    check_file(Path(path), remedy)
    try:
        with warnings.catch_warnings():
            # torch recommends torch.export to who writes such files; the published ones are what they are.
            warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated")
            return torch.jit.load(str(path), map_location="cpu")
    except RuntimeError:
        raise ValueError(f"Argument `weights` expected a TorchScript file, but got {path}. {remedy}") from None


class TorchScriptFeatures(FeatureNetwork):
    """The output of any TorchScript file that maps RGB images to feature vectors.

    Nothing is resized or normalised unless asked for: by default the network gets float32 RGB images in [0, 1] of the
    size that they have. Grey images have their channel repeated *(our choice)*. The file's code runs inside torch's
    TorchScript interpreter, which knows no files and no network; yet load only what you trust.

    A copy by ``pickle`` holds the path, not the network.

    Args:
        weights: the file.
        size: resize to this height and width, bilinearly with antialiasing; a single number is that of the shorter
            edge. By default images stay as they are.
        mean: subtract this from each channel.
        std: then divide each channel by this.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is no TorchScript file.
    """

    def __init__(
        self,
        weights: PathLike_,
        *,
        size: int | tuple[int, int] | None = None,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.weights, self.size, self.mean, self.std = Path(weights), size, mean, std
        self.network = load_torchscript(weights, self._remedy())
        self.freeze()

    @staticmethod
    def _remedy() -> str:
        return "Write one by torch.jit.save."

    def forward(self, images: Tensor) -> Tensor:
        """Map images, shape ``(N, 3, H, W)`` or ``(N, 1, H, W)``, to features, shape ``(N, D)``.

        Raises:
            TypeError: as :func:`~lightning_iet.metrics.features.base.rgb_images`.
            ValueError: as :func:`~lightning_iet.metrics.features.base.rgb_images`; if the network returns
                something other than one vector for each image.
        """
        rgb = unit_interval(rgb_images(images))
        if self.size is not None:
            rgb = resized(rgb, self.size)
        features = self.network(normalized(rgb, self.mean, self.std).to(self.dtype))
        if not isinstance(features, Tensor) or features.shape[:1] != images.shape[:1]:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"Argument `weights` expected a network that returns shape (N, D), but {self.weights} returned {found} "
                f"for {len(images)} images. Wrap it in a module that returns one vector for each image."
            )
        return features.flatten(1)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), size=self.size, mean=self.mean, std=self.std), (self.weights,)


class SSCDFeatures(TorchScriptFeatures):
    """Descriptors of the copy-detection network SSCD (Pizzi et al., CVPR 2022, arXiv:2202.10261), of length one.

    The shorter edge is resized to 288, bilinearly with antialiasing, and ImageNet's mean and standard deviation are
    applied, as the network's authors recommend. Grey images have their channel repeated *(our choice)*.

    Args:
        weights: ``sscd_disc_mixup.torchscript.pt``, or another of the authors' TorchScript files; by default the path
            in the environment variable ``LIGHTNING_IET_SSCD``. It is never downloaded; its licence is non-commercial.

    Raises:
        FileNotFoundError: if there is neither ``weights`` nor the variable, or the file is missing.
        ValueError: if it is no TorchScript file.
    """

    def __init__(self, weights: PathLike_ | None = None) -> None:
        weights = weights or os.environ.get(SSCD_VARIABLE)
        if not weights:
            raise FileNotFoundError(
                f"Argument `weights` expected SSCD's TorchScript file, but got None. {self._remedy()}"
            )
        super().__init__(weights, size=288, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        self.num_features = self(torch.zeros(1, 3, 288, 288)).shape[1]  # 512, or 1024 for the large one

    @staticmethod
    def _remedy() -> str:
        return f"Get {_SSCD_URL} and pass its path as `weights`, or set {SSCD_VARIABLE} to it."

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.weights,)
