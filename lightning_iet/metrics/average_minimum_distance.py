"""Average minimum distance (AMD), the memorization measure of MemControl."""

from typing import Any

from torch import Tensor, nn

from lightning_iet.functional.nearest_training_distance import distance_summary
from lightning_iet.metrics.base import CosineMetric, TrainingSet
from lightning_iet.metrics.features import PathLike_


class AverageMinimumDistance(CosineMetric):
    r"""Average, over generated images, of the cosine distance to the nearest training image in a feature space.

    .. math:: \mathrm{AMD} = \frac1Q \sum_{\hat x} \min_j \big(1 - \cos(f(\hat x), f(x_j))\big)

    (Dutt et al., *MemControl: Mitigating Memorization in Diffusion Models via Automated Parameter Selection*, WACV
    2025, arXiv:2405.19458.) Smaller means more memorization.

    It is an average: one copy in a hundred hides among images that are not. Its scale belongs to the feature network;
    compare it with the AMD of as many held-out real images.

    Input of ``update`` and ``forward``:

    - ``generated``: images, shape ``(Q, C, H, W)``, uint8 or floating point in [0, 1].

    Output of ``compute`` and ``forward``:

    - the average, a 0-d tensor in [0, 2]; NaN while there are no generated images.

    Args:
        train: the training set: a tensor ``(N, C, H, W)``, a map-style data set of images or of tuples that begin with
            one, or a data loader; uint8, or floating point in [0, 1].
        features: a name or a file for :func:`~lightning_iet.metrics.features.feature_extractor`, or a module.
        weights: the feature network's weight file.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if ``train`` is of another kind.
        ValueError: if ``train`` is empty, holds images of several sizes or values outside [0, 1]; as
            :func:`~lightning_iet.metrics.features.feature_extractor`.
        FileNotFoundError: as :func:`~lightning_iet.metrics.features.feature_extractor`.
        ModuleNotFoundError: as :func:`~lightning_iet.metrics.features.feature_extractor`.

    Example:
        >>> import torch
        >>> train = torch.eye(4).reshape(4, 1, 2, 2)
        >>> metric = AverageMinimumDistance(train, features="pixels")
        >>> metric.update(torch.cat([0.5 * train[:1], torch.ones(1, 1, 2, 2)]))
        >>> metric.compute()
        tensor(0.2500)
    """

    higher_is_better = None
    plot_lower_bound = 0.0

    def __init__(
        self,
        train: TrainingSet,
        *,
        features: PathLike_ | nn.Module = "inception",
        weights: PathLike_ | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(train, features=features, weights=weights, **kwargs)

    def compute(self) -> Tensor:
        """Return the average over all updates and processes."""
        return distance_summary(self.nearest(), quantiles=())["mean"]
