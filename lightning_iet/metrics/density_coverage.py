"""Density and coverage: precision and recall that one outlier does not spoil."""

from os import PathLike
from typing import Any

from torch import Tensor, nn

from lightning_iet.functional.density_coverage import density_coverage
from lightning_iet.metrics.base import TwoSampleMetric


class DensityCoverage(TwoSampleMetric):
    r"""How densely generated images lie among real ones, and the share of real images that have one nearby.

    .. math::
        \mathrm{density} = \frac{1}{kM} \sum_{i,j} \Big[\lVert g_i - r_j \rVert < \rho_k(r_j)\Big], \qquad
        \mathrm{coverage} = \frac1N \sum_{j} \Big[\exists i : \lVert g_i - r_j \rVert < \rho_k(r_j)\Big],

    where :math:`\rho_k` is the distance of a real feature to the ``k``-th nearest other real one (Naeem et al.,
    *Reliable Fidelity and Diversity Metrics for Generative Models*, ICML 2020, arXiv:2002.09797).

    A model that copies its training images has density and coverage near 1: neither sees memorization. Held-out real
    images have a coverage below 1, which depends on ``k`` and on the numbers of images; compare with theirs.

    Input of ``update``:

    - ``images``: shape ``(N, C, H, W)``, uint8 or floating point in [0, 1].
    - ``real``: whether these are real images.

    Output of ``compute``:

    - ``"density"``, at least 0, about 1 for real images, and ``"coverage"``, in [0, 1]; 0-d tensors, float64.

    Args:
        features: a name or a file for :func:`~lightning_iet.metrics.features.feature_extractor`, or a module.
        k: the neighbour whose distance is the radius; 5 as published.
        weights: the feature network's weight file.
        reset_real_features: whether ``reset`` drops the real images too.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``k < 1``; in ``compute``, if there are no more than ``k`` real images or no generated ones; as
            :func:`~lightning_iet.metrics.features.feature_extractor`.

    Example:
        >>> import torch
        >>> draw = torch.Generator().manual_seed(0)
        >>> real = torch.rand(200, 1, 2, 2, generator=draw)
        >>> metric = DensityCoverage("pixels")
        >>> metric.update(real, real=True)
        >>> metric.update(real[:50] / 4, real=False)  # dark images only
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items()}
        {'density': 0.89, 'coverage': 0.06}
    """

    def __init__(self, features: str | PathLike[str] | nn.Module = "inception", *, k: int = 5, **kwargs: Any) -> None:
        super().__init__(features, k=k, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Return density and coverage over all updates and processes."""
        return density_coverage(*self.both(), k=self.k)
