"""FID as clean-fid computes it, of images in memory."""

from os import PathLike
from typing import Any

from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_iet.metrics.base import BaseMetric
from lightning_iet.metrics.features import CleanInceptionFeatures


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
