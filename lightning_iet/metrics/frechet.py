"""Fréchet distances between real and generated images: in a feature space of one's choice, and as clean-fid's FID."""

from os import PathLike
from typing import Any

from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_iet.metrics.base import BaseMetric
from lightning_iet.metrics.features import CleanInceptionFeatures, PathLike_, feature_extractor


def frechet_distance(
    features: PathLike_ | nn.Module = "digits",
    *,
    weights: PathLike_ | None = None,
    download: bool = False,
    **kwargs: Any,
) -> FrechetInceptionDistance:
    r"""Build torchmetrics' ``FrechetInceptionDistance`` over one of this package's feature networks, or your own.

    .. math:: \lVert \mu - \mu' \rVert^2 + \operatorname{tr}\big(\Sigma + \Sigma' - 2 (\Sigma \Sigma')^{1/2}\big)

    of the features' means and covariances (Heusel et al., NeurIPS 2017, arXiv:1706.08500). All arithmetic is
    torchmetrics', in float64. Figures compare only within one feature space and one number of images.

    Args:
        features: a name for :func:`~lightning_iet.metrics.features.feature_extractor`, or a module that maps images to
            ``(N, num_features)`` and has the attribute ``num_features``; which ``"pixels"`` and TorchScript files of
            one's own have not, SSCD's apart.
        weights: as :func:`~lightning_iet.metrics.features.feature_extractor`.
        download: as :func:`~lightning_iet.metrics.features.feature_extractor`.
        kwargs: passed on to torchmetrics, e.g. ``reset_real_features=False`` to keep the real images over ``reset()``.

    Returns:
        The metric, with ``update(images, real=True)``, ``update(images, real=False)``, ``compute()``. Images are uint8
        or floating point in [0, 1]; torchmetrics hands them to the network as they are.

    Raises:
        ValueError: as :func:`~lightning_iet.metrics.features.feature_extractor`; if a module lacks ``num_features``.
        FileNotFoundError: as :func:`~lightning_iet.metrics.features.feature_extractor`.
        ModuleNotFoundError: as :func:`~lightning_iet.metrics.features.feature_extractor`.
        ConnectionError: as :func:`~lightning_iet.metrics.features.feature_extractor`.

    Example:
        >>> import torch
        >>> from sklearn.datasets import load_digits
        >>> digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
        >>> fid = frechet_distance("digits")
        >>> fid.update(digits[::2], real=True)
        >>> fid.update(digits[1::2], real=False)
        >>> round(fid.compute().item(), 1)
        0.3
    """
    try:
        extractor = feature_extractor(features, weights=weights, download=download)
    except ValueError as error:
        raise ValueError(str(error).replace("Argument `name`", "Argument `features`")) from error
    if not hasattr(extractor, "num_features"):
        raise ValueError(
            "Argument `features` expected a module with an attribute `num_features`, "
            f"but got {type(extractor).__name__} without one. Set it to the width of the module's output."
        )
    return FrechetInceptionDistance(feature=extractor, **kwargs)


class CleanFID(BaseMetric, FrechetInceptionDistance):
    r"""Fréchet distance with clean-fid's resizing and Inception: the value of ``cleanfid.fid.compute_fid``.

    .. math:: \lVert \mu - \mu' \rVert^2 + \operatorname{tr}\big(\Sigma + \Sigma' - 2 (\Sigma \Sigma')^{1/2}\big)

    of the 2,048 features' means and covariances (Heusel et al., NeurIPS 2017, arXiv:1706.08500; Parmar et al., *On
    Aliased Resizing and Surprising Subtleties in GAN Evaluation*, CVPR 2022, arXiv:2104.11222). Resizing is Pillow's,
    antialiased and in floating point; the original FID resizes without antialiasing, so the two values differ, most
    for images that are much smaller or larger than 299x299.

    It does not see memorization: a copy of the training set has FID 0. It grows as images get fewer, and compares only
    at one number of images, 50,000 by custom.

    Input of ``update``, as of torchmetrics' FID:

    - ``imgs``: shape ``(N, 3, H, W)`` or ``(N, 1, H, W)``, uint8, or floating point in [0, 1].
    - ``real``: whether these are real images.

    Output of ``compute``:

    - the distance, a 0-d tensor, at least 0 up to rounding.

    Args:
        weights: ``inception-2015-12-05.pt``, the TorchScript file that clean-fid uses. It is never downloaded; without
            it the error says where to get it.
        kwargs: passed on to torchmetrics, e.g. ``reset_real_features=False``.

    Raises:
        ModuleNotFoundError: if clean-fid is not installed.
        FileNotFoundError: if ``weights`` is not given, or is missing.
        ValueError: if it is no TorchScript file, or that of another network.
    """

    settings = ("reset_real_features",)

    def __init__(self, weights: str | PathLike[str] | None = None, **kwargs: Any) -> None:
        super().__init__(feature=CleanInceptionFeatures(weights), **kwargs)
