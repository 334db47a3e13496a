"""Memorized fraction (Yoon et al. 2023, Gu et al. 2023) and memorized quantity, MQ (Liu et al., ECCV 2024)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, cast

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from torch import Tensor

from lightning_iet.functional.checks import check_number, check_numbers
from lightning_iet.functional.duplicates import duplicate_groups, nearest_of_two_groups
from lightning_iet.functional.memorization import MQ_THRESHOLDS, count_below, memorization_ratio, mq_name, nearest_ratio
from lightning_iet.functional.neighbors import search_rows
from lightning_iet.metrics.base import TrainingSet, TrainingSetMetric, Values, joined


class Copies(NamedTuple):
    """Generated images that count as copies, with their originals.

    Attributes:
        generated: which image it is, counted in order of ``update``, int64, ascending, shape ``(M,)``.
        train: index of the nearest training image, int64, shape ``(M,)``.
        ratios: ``d1 / d2``, float32, shape ``(M,)``.
    """

    generated: Tensor
    train: Tensor
    ratios: Tensor


class MemorizedFraction(TrainingSetMetric):
    r"""Share of generated images that are far closer to one training image than to any other.

    .. math:: \frac{1}{Q} \#\{\hat x : d_1(\hat x) / d_2(\hat x) < \rho\}

    with plain l2 distances to the nearest and the second nearest training image, and ``ρ = 1/3`` (Yoon et al.,
    *Diffusion Probabilistic Models Generalize when They Fail to Memorize*, 2023; Gu et al., *On Memorization in
    Diffusion Models*, arXiv:2310.02664).

    An exact copy of a training image that stands twice in the set has ``d1 = d2 = 0`` and counts as memorised *(our
    choice)*. A near copy of it has a ratio near 1 and does not count as published. With ``duplicates="group"`` it does
    *(our choice: images that stand there often are the ones that are copied)*: near-duplicates in the training set, see
    :func:`~lightning_iet.functional.duplicates.duplicate_groups`, are then one image, so that ``d2`` is the distance to
    the nearest training image of another group. They are looked for at the first update, which costs a search of the
    training set among itself.

    Input of ``update`` and ``forward``:

    - ``generated``: images, shape ``(Q, C, H, W)``, uint8 or floating point in [0, 1].

    Output of ``compute`` and ``forward``:

    - the share, a 0-d tensor in [0, 1]; NaN while there are no generated images.

    Args:
        train: the training set: a tensor ``(N, C, H, W)``, a map-style data set of images or of tuples that begin with
            one, or a data loader; uint8, or floating point in [0, 1].
        ratio: the threshold ``ρ``, in (0, 1].
        duplicates: ``"keep"`` compares with every training image, as published; ``"group"`` counts near-duplicates in
            the training set as one image.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if ``train`` is of another kind.
        ValueError: if ``train`` is empty, holds images of several sizes, values outside [0, 1] or fewer than two
            images; if ``ratio`` lies outside (0, 1]; if ``duplicates`` is something else; in ``update``, if all
            training images are near-duplicates of one another and are to be grouped.

    Example:
        >>> train = torch.rand(100, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> copies = train[:5]
        >>> others = torch.rand(15, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        >>> metric = MemorizedFraction(train)
        >>> metric.update(torch.cat([others, copies]))
        >>> metric.compute()
        tensor(0.2500)
        >>> metric.copies().generated, metric.copies().train
        (tensor([15, 16, 17, 18, 19]), tensor([0, 1, 2, 3, 4]))
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    settings = ("ratio", "duplicates")
    memorized: Tensor
    total: Tensor
    originals: list[Tensor]
    ratios: list[Tensor]

    def __init__(
        self,
        train: TrainingSet,
        *,
        ratio: float = 1 / 3,
        duplicates: Literal["keep", "group"] = "keep",
        **kwargs: Any,
    ) -> None:
        check_number("ratio", ratio, "(0, 1]", "The published one is 1/3.")
        if duplicates not in ("keep", "group"):
            raise ValueError(f"Argument `duplicates` expected 'keep' or 'group', but got {duplicates!r}. Choose one.")
        super().__init__(train, k=2, **kwargs)
        self.ratio, self.duplicates = ratio, duplicates
        self.groups: Tensor | None = None  # of the training images, once they are known
        self.add_state("memorized", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("originals", [], dist_reduce_fx="cat")  # of every generated image; -1 for what is no copy
        self.add_state("ratios", [], dist_reduce_fx="cat")

    def update(self, generated: Tensor) -> None:
        """Count in more generated images, shape ``(Q, C, H, W)``."""
        rows = self.generated_rows(generated)
        if self.duplicates == "keep":
            # With ties in order: on grids of pixel values d1 / d2 often meets the threshold exactly.
            sq_distances, indices = search_rows(rows, self.train_rows, 2, norms=self.train_norms)
        else:
            if self.groups is None:
                self.groups = duplicate_groups(self.train_rows).group.to(self.device)
            sq_distances, indices = nearest_of_two_groups(rows, self.train_rows, self.groups, norms=self.train_norms)
        ratios = nearest_ratio(sq_distances)
        memorized = ratios < self.ratio
        self.memorized += memorized.sum()
        self.total += len(generated)
        self.originals.append(indices[:, 0].where(memorized, -1))
        self.ratios.append(ratios)

    def compute(self) -> Tensor:
        """Return the share over all updates and processes."""
        self.warn_if_empty(self.total)
        return self.memorized / self.total

    def copies(self) -> Copies:
        """Return which of the images that this process was updated with are copies, and of which training image."""
        originals = joined(self.originals, device=self.device).long()
        places = (originals >= 0).nonzero()[:, 0]
        return Copies(places, originals[places], joined(self.ratios, device=self.device)[places])

    def _apply(self, fn: Callable[..., Any], exclude_state: Iterable[str] = "") -> "MemorizedFraction":
        super()._apply(fn, exclude_state)
        self.groups = None if self.groups is None else self.groups.to(self.device)
        return self


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
        self.warn_if_empty(self.total)
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
