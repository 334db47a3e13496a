"""What the metrics share that compare directions of features with those of the training set."""

from typing import Any

from torch import Tensor, nn

from lightning_iet.functional.average_minimum_distance import nearest_cosine_distance, unit_rows
from lightning_iet.metrics.base import joined
from lightning_iet.metrics.features import feature_extractor
from lightning_iet.metrics.features.files import PathLike_
from lightning_iet.metrics.plotting import PlottedMetric
from lightning_iet.metrics.training_set import TrainingSet, TrainingSetMetric

__all__ = ["CosineMetric"]


class CosineMetric(TrainingSetMetric, PlottedMetric):
    """Base of the metrics of the cosine distance to the nearest training image.

    Args:
        train: as :class:`~lightning_iet.metrics.training_set.TrainingSetMetric`.
        features: a name or a file for :func:`~lightning_iet.metrics.features.feature_extractor`, or a module.
        weights: the feature network's weight file.
        kwargs: passed on to :class:`torchmetrics.Metric`.
    """

    distances: list[Tensor]

    def __init__(
        self,
        train: TrainingSet,
        *,
        features: PathLike_ | nn.Module,
        weights: PathLike_ | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(train, k=1, features=feature_extractor(features, weights=weights), **kwargs)
        self.add_state("distances", [], dist_reduce_fx="cat")

    def references(self, rows: Tensor) -> Tensor:
        """Return the features of the training set, scaled to length one; those without a direction are left out."""
        return unit_rows(rows[rows.any(dim=1)])

    def update(self, generated: Tensor) -> None:
        """Take in more generated images, shape ``(Q, C, H, W)``."""
        rows = unit_rows(self.generated_rows(generated))
        self.distances.append(nearest_cosine_distance(rows, self.train_rows, norms=self.train_norms))

    def nearest(self) -> Tensor:
        """Return the distances of all updates and processes, shape ``(Q,)``."""
        return joined(self.distances, device=self.device)
