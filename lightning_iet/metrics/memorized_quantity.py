"""Memorized quantity (MQ), the measure of Liu et al., ECCV 2024."""

from collections.abc import Sequence
from typing import Any, cast

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from torch import Tensor

from lightning_iet.functional.checks import check_numbers
from lightning_iet.functional.memorization import MQ_THRESHOLDS, count_below, memorization_ratio, mq_name
from lightning_iet.metrics.base import TrainingSet, TrainingSetMetric, Values


class MemorizedQuantity(TrainingSetMetric):
    r"""Share of generated images that stand much closer to one training image than to its neighbourhood.

    .. math::
        \mathrm{MQ}_a = \frac{1}{Q} \#\{\hat x : r(\hat x) < a\}, \qquad
        r(\hat x) = \min_j D_j \Big/ \frac{1}{k} \sum_{j=1}^{k} D_j, \qquad D_j = \lVert \hat x - x_j \rVert^2

    with the ``k`` nearest training images in the mean, the nearest included (Liu, Guan, Wu, Miao, *Iterative Ensemble
    Training with Anti-Gradient Control for Mitigating Memorization in Diffusion Models*, ECCV 2024, arXiv:2407.15328).
    The published measure is the count, the share times the number of generated images; the counts of this process are
    in ``counts`` and ``total``. The distances are exact, and streamed: memory does not grow with the product of the two
    set sizes.

    A share says little by itself. Compare it with that of held-out real images: on data of low variety, digits say,
    many of those have a small ratio too, without having been copied from anything.

    Input of ``update`` and ``forward``:

    - ``generated``: images, shape ``(Q, C, H, W)``, uint8 or floating point in [0, 1].

    Output of ``compute`` and ``forward``:

    - for each threshold the share, under ``"mq_0.15"`` and the like, a 0-d tensor in [0, 1]; NaN while there are no
      generated images.

    Args:
        train: the training set: a tensor ``(N, C, H, W)``, a map-style data set of images or of tuples that begin with
            one, or a data loader; uint8, or floating point in [0, 1].
        thresholds: the values of ``a``, each in (0, 1].
        k: neighbours in the mean; 50 as published.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if ``train`` is of another kind.
        ValueError: if ``train`` is empty, holds images of several sizes, values outside [0, 1] or fewer than ``k``
            images; if ``k < 2``, or a threshold lies outside (0, 1].

    Example:
        >>> train = torch.rand(100, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> copies = train[:5]
        >>> others = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        >>> metric = MemorizedQuantity(train, thresholds=(0.15, 0.50))
        >>> metric.update(torch.cat([copies, others]))
        >>> metric.compute()
        {'mq_0.15': tensor(0.2000), 'mq_0.5': tensor(0.2000)}
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    settings = ("thresholds", "k")
    counts: Tensor
    total: Tensor

    def __init__(
        self, train: TrainingSet, *, thresholds: Sequence[float] = MQ_THRESHOLDS, k: int = 50, **kwargs: Any
    ) -> None:
        if k < 2:
            raise ValueError(f"Argument `k` expected at least 2, but got {k}. The published measure uses 50.")
        remedy = f"Leave it out for the published ones, {MQ_THRESHOLDS}."
        check_numbers("thresholds", thresholds, "(0, 1]", remedy)
        if not thresholds:
            raise ValueError(f"Argument `thresholds` expected numbers in (0, 1], but got (). {remedy}")
        super().__init__(train, k=k, **kwargs)
        self.thresholds = tuple(thresholds)
        self.add_state("counts", torch.zeros(len(thresholds), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def _too_few(self, found: int, k: int) -> str:
        remedy = f"Pass k={found} or less" if found >= 2 else "Add images"
        return f"Argument `train` expected at least k={k} images, but got {found}. {remedy}."

    def update(self, generated: Tensor) -> None:
        """Count in more generated images, shape ``(Q, C, H, W)``."""
        self.counts += count_below(memorization_ratio(self.neighbors(generated)[0]), self.thresholds)
        self.total += len(generated)

    def compute(self) -> dict[str, Tensor]:
        """Return the share at each threshold, over all updates and processes."""
        return dict(zip(map(mq_name, self.thresholds), self.counts / self.total, strict=True))

    def plot(self, val: Values | None = None, ax: Axes | None = None) -> tuple[FigureBase, Axes]:
        """Draw the share against the threshold.

        Args:
            val: a result of ``compute`` or ``forward``, or several of them (a curve each); by default ``compute()``.
            ax: where to draw; by default in a new figure.

        Returns:
            The figure and its axes.

        Example:
            >>> metric = MemorizedQuantity(torch.eye(4).reshape(4, 1, 2, 2), k=3)
            >>> metric.update(torch.eye(4)[:1].reshape(1, 1, 2, 2))
            >>> figure, axes = metric.plot()
            >>> axes.get_ylabel()
            'share of generated images with r < a'
        """
        val = self.compute() if val is None else val
        ax = plt.subplots()[1] if ax is None else ax
        for curve in cast("Sequence[dict[str, Tensor]]", [val] if isinstance(val, dict) else val):
            ax.plot(self.thresholds, [float(share) for share in curve.values()], marker="o")
        ax.set(xlabel="threshold a", ylabel="share of generated images with r < a", title=type(self).__name__)
        ax.set_ylim(self.plot_lower_bound, self.plot_upper_bound)
        ax.grid(visible=True)
        return ax.figure, ax
