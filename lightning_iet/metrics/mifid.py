"""MiFID, the Fréchet distance that punishes memorization."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_iet.functional.average_minimum_distance import unit_rows
from lightning_iet.functional.mifid import (
    check_threshold,
    frechet_distance,
    memorization_distances,
    moments,
    moments_of_sums,
    penalized,
)
from lightning_iet.metrics.base import TrainingSet, TrainingSetMetric
from lightning_iet.metrics.features import PathLike_, feature_extractor


class MiFID(TrainingSetMetric):
    r"""Fréchet distance to the training set, divided by the mean distance to the nearest training image if small.

    .. math::
        \mathrm{MiFID} = \frac{\mathrm{FID}}{m_\tau}, \qquad
        m = \frac1Q \sum_{\hat x} \min_j \big(1 - |\cos(f(\hat x), f(x_j))|\big), \qquad
        m_\tau = \begin{cases} m + 10^{-14} & m < \tau \\ 1 & \text{otherwise} \end{cases}

    (Bai et al., *On Training Sample Memorization: Lessons from Benchmarking Generative Modeling with a Large-scale
    Competition*, KDD 2021, arXiv:2106.03062.)

    torchmetrics' ``MemorizationInformedFrechetInceptionDistance`` takes the minimum over the generated images, for each
    training image. A generator that emits one training image over and over is then far from most of them and gets no
    penalty. Here the minimum runs over the training images, as published.

    The penalty is a step: just above ``threshold`` it is none, just below tenfold. It is an average too, so one copy in
    a hundred goes unpunished, and good images of low variety may fall below a threshold made for other data.

    Input of ``update`` and ``forward``:

    - ``generated``: images, shape ``(Q, C, H, W)``, uint8 or floating point in [0, 1].

    Output of ``compute`` and ``forward``:

    - the distance, a 0-d tensor, at least 0; NaN while there are fewer than two generated images, infinite for a copy
      of the whole training set.

    Args:
        train: the training set: a tensor ``(N, C, H, W)``, a map-style data set of images or of tuples that begin with
            one, or a data loader; uint8, or floating point in [0, 1].
        features: a name or a file for :func:`~lightning_iet.metrics.features.feature_extractor`, or a module.
        threshold: :math:`\tau`; 0.1 as in torchmetrics. It belongs to one feature space.
        weights: the feature network's weight file.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if ``train`` is of another kind.
        ValueError: if ``train`` has fewer than two images, images of several sizes or values outside [0, 1]; if
            ``threshold`` lies outside [0, 1]; as :func:`~lightning_iet.metrics.features.feature_extractor`.
        FileNotFoundError: as :func:`~lightning_iet.metrics.features.feature_extractor`.
        ModuleNotFoundError: as :func:`~lightning_iet.metrics.features.feature_extractor`.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> train, held_out = torch.rand(2, 50, 1, 4, 4, generator=draw)
        >>> metric = MiFID(train, features="pixels", threshold=0.05)
        >>> metric.update(held_out)
        >>> novel = metric.compute()
        >>> metric.reset()
        >>> metric.update(train[:1].expand(50, -1, -1, -1))
        >>> bool(metric.compute() > 1e12 * novel)
        True
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    settings = ("features", "threshold")
    count: Tensor
    total: Tensor
    products: Tensor
    memorization: Tensor

    def __init__(
        self,
        train: TrainingSet,
        *,
        features: PathLike_ | nn.Module = "inception",
        threshold: float = 0.1,
        weights: PathLike_ | None = None,
        **kwargs: Any,
    ) -> None:
        check_threshold(threshold)
        super().__init__(train, k=2, features=feature_extractor(features, weights=weights), **kwargs)
        self.threshold = threshold
        self.signed = bool((self.train_rows < 0).any())
        width = self.train_rows.shape[1]
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(width).double(), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(width, width).double(), dist_reduce_fx="sum")
        self.add_state("memorization", torch.tensor(0.0).double(), dist_reduce_fx="sum")

    def references(self, rows: Tensor) -> Tensor:
        """Return the features of the training set, scaled to length one; those without a direction are left out."""
        self.train_moments = moments(rows)
        return unit_rows(rows[rows.any(dim=1)])

    def update(self, generated: Tensor) -> None:
        """Take in more generated images, shape ``(Q, C, H, W)``."""
        rows = self.generated_rows(generated)
        distances = memorization_distances(unit_rows(rows), self.train_rows, norms=self.train_norms, signed=self.signed)
        self.count += len(rows)
        self.total += rows.double().sum(dim=0)
        self.products += rows.double().T @ rows.double()
        self.memorization += distances.double().sum()

    def compute(self) -> Tensor:
        """Return the distance over all updates and processes."""
        self.warn_if_empty(self.count)
        if self.count < 2:
            return torch.tensor(torch.nan, device=self.device)
        fid = frechet_distance(moments_of_sums(self.count, self.total, self.products), self.train_moments)
        return penalized(fid, self.memorization / self.count, threshold=self.threshold).float()

    def _apply(self, fn: Callable[..., Any], exclude_state: Iterable[str] = "") -> "MiFID":
        super()._apply(fn, exclude_state)
        mean, covariance = self.train_moments
        self.train_moments = mean.to(self.device), covariance.to(self.device)
        return self
