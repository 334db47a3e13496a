"""What the metrics share that compare the features of generated images with those of real ones."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.utilities import dim_zero_cat

from lightning_iet.metrics.features import embed_images, feature_extractor
from lightning_iet.metrics.features.files import PathLike_
from lightning_iet.metrics.plotting import PlottedMetric

__all__ = ["TwoSampleMetric"]


class TwoSampleMetric(PlottedMetric):
    """Base of the metrics of two sets of features, fed like torchmetrics' FID: ``update(images, real=True | False)``.

    All features are kept until ``reset``, in float32. A sampler that repeats images to give every process as many makes
    the figures those of the repeated set.

    Args:
        features: a name or a file for :func:`~lightning_iet.metrics.features.feature_extractor`, or a module.
        k: the neighbour that gives a ball its radius.
        weights: the feature network's weight file.
        reset_real_features: whether ``reset`` drops the real images too.
        kwargs: passed on to :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True
    plot_lower_bound = 0.0
    real: list[Tensor]
    generated: list[Tensor]
    width: Tensor

    def __init__(
        self,
        features: PathLike_ | nn.Module = "inception",
        *,
        k: int,
        weights: PathLike_ | None = None,
        reset_real_features: bool = True,
        **kwargs: Any,
    ) -> None:
        if k < 1:
            raise ValueError(f"Argument `k` expected at least 1, but got {k}. Leave it out for the published one.")
        super().__init__(**kwargs)
        self.features = features if isinstance(features, nn.Module) else feature_extractor(features, weights=weights)
        self.k, self.reset_real_features = k, reset_real_features
        # Flat, because torchmetrics cannot reduce rows over processes one of which has none.
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")
        self.add_state("width", torch.tensor(1), dist_reduce_fx="max")

    def update(self, images: Tensor, real: bool) -> None:
        """Take in more images, shape ``(N, C, H, W)``, uint8 or floating point in [0, 1], all real or all generated."""
        rows = embed_images(self.features, images)
        if len(rows):
            self.width = torch.full_like(self.width, rows.shape[1])
            (self.real if real else self.generated).append(rows.flatten().to(self.device, self.dtype))

    def both(self) -> tuple[Tensor, Tensor]:
        """Return the features of generated and real images, shapes ``(M, D)`` and ``(N, D)``.

        Raises:
            ValueError: if there are no images of one kind.
        """
        for name, state in (("generated", self.generated), ("real", self.real)):
            if sum(part.numel() for part in state) == 0:
                raise ValueError(
                    f"{type(self).__name__} expected {name} images, but got none. "
                    f"Call update(images, real={name == 'real'}) first."
                )
        width = int(self.width)
        return dim_zero_cat(self.generated).reshape(-1, width), dim_zero_cat(self.real).reshape(-1, width)

    def reset(self) -> None:
        """Drop the images; the real ones stay with ``reset_real_features=False``."""
        real, width = list(self.real), self.width
        super().reset()
        if not self.reset_real_features:
            self.real, self.width = real, width
