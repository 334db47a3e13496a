"""What the metrics share that compare the features of generated images with those of real ones."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_iet.metrics.base import TwoKindsMetric, joined
from lightning_iet.metrics.features import embed_images, feature_extractor
from lightning_iet.metrics.features.files import PathLike_
from lightning_iet.metrics.plotting import PlottedMetric

__all__ = ["TwoSampleMetric"]


class TwoSampleMetric(TwoKindsMetric, PlottedMetric):
    """Base of the metrics of two sets of features, fed like torchmetrics' FID: ``update(images, real=True | False)``.

    All features are kept until ``reset``, in float32. A sampler that repeats images to give every process as many makes
    the figures those of the repeated set. ``forward`` does what ``update`` does, and returns nothing.

    Args:
        features: a name or a file for :func:`~lightning_iet.metrics.features.feature_extractor`, or a module.
        k: the neighbour that gives a ball its radius.
        weights: the feature network's weight file.
        reset_real_features: whether ``reset`` drops the real images too.
        kwargs: passed on to :class:`torchmetrics.Metric`.
    """

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
        self.features = feature_extractor(features, weights=weights)
        self.k, self.reset_real_features = k, reset_real_features
        # Flat, because torchmetrics cannot reduce rows over processes one of which has none.
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")
        self.add_state("width", torch.tensor(0), dist_reduce_fx=None)  # of every process

    def update(self, images: Tensor, real: bool) -> None:
        """Take in more images, shape ``(N, C, H, W)``, uint8 or floating point in [0, 1], all real or all generated.

        Raises:
            ValueError: if their features are wider or narrower than those of earlier images.
        """
        rows = embed_images(self.features, images)
        if len(rows):
            width = self._common_width(rows.shape[1])
            self.width = torch.full_like(self.width, width)
            (self.real if real else self.generated).append(rows.flatten().to(self.device))

    def _common_width(self, *more: int) -> int:
        """Return the width of the features of all updates and processes."""
        widths = sorted({width for width in (*self.width.flatten().tolist(), *more) if width})
        if len(widths) > 1:
            raise ValueError(
                "Argument `images` expected images whose features are of one width, but got "
                f"{' and '.join(map(str, widths))}. Resize all images, real and generated, to one size."
            )
        return widths[0]

    def both(self) -> tuple[Tensor, Tensor]:
        """Return the features of generated and real images, shapes ``(M, D)`` and ``(N, D)``.

        Raises:
            ValueError: if there are no images of one kind, or processes have features of several widths.
        """
        generated, real = (joined(state, device=self.device) for state in (self.generated, self.real))
        for name, values in (("generated", generated), ("real", real)):
            if values.numel() == 0:
                raise ValueError(
                    f"{type(self).__name__} expected {name} images, but got none. "
                    f"Call update(images, real={name == 'real'}) first."
                )
        width = self._common_width()
        return generated.reshape(-1, width), real.reshape(-1, width)

    def reset(self) -> None:
        """Drop the images; the real ones stay with ``reset_real_features=False``."""
        real, width = list(self.real), self.width
        super().reset()
        if real and not self.reset_real_features:
            self.real, self.width = real, width
