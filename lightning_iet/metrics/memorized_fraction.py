"""Memorized fraction, the measure of Yoon et al. 2023 and Gu et al. 2023."""

from typing import Any

import torch
from torch import Tensor

from lightning_iet.functional.checks import check_number
from lightning_iet.functional.memorization import nearest_ratio
from lightning_iet.metrics.base import PlottedMetric, TrainingSet, TrainingSetMetric


class MemorizedFraction(TrainingSetMetric, PlottedMetric):
    r"""Share of generated images that are far closer to one training image than to any other.

    .. math:: \frac{1}{Q} \#\{\hat x : d_1(\hat x) / d_2(\hat x) < \rho\}

    with plain l2 distances to the nearest and the second nearest training image, and ``ρ = 1/3`` (Yoon et al.,
    *Diffusion Probabilistic Models Generalize when They Fail to Memorize*, 2023; Gu et al., *On Memorization in
    Diffusion Models*, arXiv:2310.02664).

    An exact copy of a training image that stands twice in the set has ``d1 = d2 = 0`` and counts as memorised *(our
    choice)*. A near copy of it has a ratio near 1 and does not count: remove duplicates, or look at
    :class:`~lightning_iet.metrics.MemorizedQuantity` as well.

    Input of ``update`` and ``forward``:

    - ``generated``: images, shape ``(Q, C, H, W)``, uint8 or floating point in [0, 1].

    Output of ``compute`` and ``forward``:

    - the share, a 0-d tensor in [0, 1]; NaN while there are no generated images.

    Args:
        train: the training set: a tensor ``(N, C, H, W)``, a map-style data set of images or of tuples that begin with
            one, or a data loader; uint8, or floating point in [0, 1].
        ratio: the threshold ``ρ``, in (0, 1].
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if ``train`` is of another kind.
        ValueError: if ``train`` is empty, holds images of several sizes, values outside [0, 1] or fewer than two
            images; if ``ratio`` lies outside (0, 1].

    Example:
        >>> train = torch.rand(100, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> copies = train[:5]
        >>> others = torch.rand(15, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        >>> metric = MemorizedFraction(train)
        >>> metric.update(torch.cat([copies, others]))
        >>> metric.compute()
        tensor(0.2500)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    ties = True  # on grids of pixel values d1 / d2 often meets the threshold exactly
    memorized: Tensor
    total: Tensor

    def __init__(self, train: TrainingSet, *, ratio: float = 1 / 3, **kwargs: Any) -> None:
        check_number("ratio", ratio, "(0, 1]", "The published one is 1/3.")
        super().__init__(train, k=2, **kwargs)
        self.ratio = ratio
        self.add_state("memorized", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, generated: Tensor) -> None:
        """Count in more generated images, shape ``(Q, C, H, W)``."""
        self.memorized += (nearest_ratio(self.sq_distances(generated)) < self.ratio).sum()
        self.total += len(generated)

    def compute(self) -> Tensor:
        """Return the share over all updates and processes."""
        return self.memorized / self.total
