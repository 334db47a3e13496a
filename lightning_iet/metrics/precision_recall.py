"""Improved precision and recall: are the images real ones, and are all kinds of real ones among them."""

from os import PathLike
from typing import Any

from torch import Tensor, nn

from lightning_iet.functional.precision_recall import precision_recall
from lightning_iet.metrics.base import TwoSampleMetric


class PrecisionRecall(TwoSampleMetric):
    r"""Share of generated images that lie among real ones, and of real images that lie among generated ones.

    .. math::
        \mathrm{precision} = \frac1M \sum_{i} \Big[\exists j : \lVert g_i - r_j \rVert \le \rho_k(r_j)\Big], \qquad
        \mathrm{recall} = \frac1N \sum_{j} \Big[\exists i : \lVert r_j - g_i \rVert \le \rho_k(g_i)\Big],

    where :math:`\rho_k` is the distance of a feature to the ``k``-th nearest other one of its own set (Kynkäänniemi et
    al., *Improved Precision and Recall Metric for Assessing Generative Models*, NeurIPS 2019, arXiv:1904.06991).

    A model that copies its training images has precision and recall near 1: neither sees memorization. One outlier
    among the real images has a large radius within which poor images count as good; see
    :class:`~lightning_iet.metrics.DensityCoverage`. Figures compare only at the same numbers of images.

    Input of ``update``:

    - ``images``: shape ``(N, C, H, W)``, uint8 or floating point in [0, 1].
    - ``real``: whether these are real images.

    Output of ``compute``:

    - ``"precision"`` and ``"recall"``, 0-d tensors in [0, 1], float64.

    Args:
        features: a name or a file for :func:`~lightning_iet.metrics.features.feature_extractor`, or a module.
        k: the neighbour whose distance is the radius; 3 as published.
        weights: the feature network's weight file.
        reset_real_features: whether ``reset`` drops the real images too.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``k < 1``; in ``compute``, if there are no more than ``k`` images of one kind; as
            :func:`~lightning_iet.metrics.features.feature_extractor`.

    Example:
        >>> import torch
        >>> draw = torch.Generator().manual_seed(0)
        >>> real = torch.rand(200, 1, 2, 2, generator=draw)
        >>> metric = PrecisionRecall("pixels")
        >>> metric.update(real, real=True)
        >>> metric.update(real[:50] / 4, real=False)  # dark images only
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items()}
        {'precision': 1.0, 'recall': 0.01}
    """

    plot_upper_bound = 1.0

    def __init__(self, features: str | PathLike[str] | nn.Module = "inception", *, k: int = 3, **kwargs: Any) -> None:
        super().__init__(features, k=k, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Return precision and recall over all updates and processes."""
        return precision_recall(*self.both(), k=self.k)
