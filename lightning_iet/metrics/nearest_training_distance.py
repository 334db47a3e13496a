"""Nearest training distance: how far generated images lie from what they could be copies of."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_iet.functional.nearest_training_distance import QUANTILES, check_quantiles, distance_summary
from lightning_iet.metrics.base import TrainingSet, TrainingSetMetric, joined
from lightning_iet.metrics.features import PathLike_, feature_extractor


class NearestTrainingDistance(TrainingSetMetric):
    r"""Mean and quantiles of the plain l2 distance of generated images to their nearest training images.

    .. math:: d_1(\hat x) = \min_j \lVert f(\hat x) - f(x_j) \rVert

    on pixels in [0, 1] or in a feature space. The low quantiles are where copies are: a mean hides a copy in a hundred.

    A distance has no natural scale. Compare it with that of as many held-out real images.

    Input of ``update`` and ``forward``:

    - ``generated``: images, shape ``(Q, C, H, W)``, uint8 or floating point in [0, 1].

    Output of ``compute`` and ``forward``:

    - ``"mean"`` and, for each quantile, ``"q0.05"`` and the like; 0-d tensors, NaN while there are no generated images.

    Args:
        train: the training set: a tensor ``(N, C, H, W)``, a map-style data set of images or of tuples that begin with
            one, or a data loader; uint8, or floating point in [0, 1].
        features: a name or a file for :func:`~lightning_iet.metrics.features.feature_extractor`, or a module.
        quantiles: numbers in [0, 1].
        weights: the feature network's weight file.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if ``train`` is of another kind.
        ValueError: if ``train`` is empty, holds images of several sizes or values outside [0, 1]; if a quantile lies
            outside [0, 1], or two are equal; as :func:`~lightning_iet.metrics.features.feature_extractor`.

    Example:
        >>> import torch
        >>> train = torch.eye(4).reshape(4, 1, 2, 2)
        >>> metric = NearestTrainingDistance(train, quantiles=(0.0, 0.5))
        >>> metric.update(0.5 * train[:3])
        >>> metric.update(train[:1])
        >>> metric.compute()
        {'mean': tensor(0.3750), 'q0': tensor(0.), 'q0.5': tensor(0.5000)}
    """

    higher_is_better = None  # far from the training set is no copy, and may be no image either
    plot_lower_bound = 0.0
    settings = ("features", "quantiles")
    distances: list[Tensor]

    def __init__(
        self,
        train: TrainingSet,
        *,
        features: PathLike_ | nn.Module = "pixels",
        quantiles: Sequence[float] = QUANTILES,
        weights: PathLike_ | None = None,
        **kwargs: Any,
    ) -> None:
        check_quantiles(quantiles)
        # Pixels need no network, and may stay uint8.
        network = None if features == "pixels" and weights is None else feature_extractor(features, weights=weights)
        super().__init__(train, k=1, features=network, **kwargs)
        self.quantiles = tuple(quantiles)
        self.add_state("distances", [], dist_reduce_fx="cat")

    def update(self, generated: Tensor) -> None:
        """Take in more generated images, shape ``(Q, C, H, W)``."""
        self.distances.append(self.neighbors(generated)[0][:, 0].sqrt())

    def compute(self) -> dict[str, Tensor]:
        """Return the summary over all updates and processes."""
        distances = joined(self.distances, device=self.device)
        self.warn_if_empty(len(distances))
        return distance_summary(distances, quantiles=self.quantiles)
