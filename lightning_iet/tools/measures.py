"""Further measures that an evaluation can take, by their names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_iet.metrics import (
    AverageMinimumDistance,
    CleanFID,
    DensityCoverage,
    ExtractionAttack,
    MiFID,
    NearestTrainingDistance,
    PrecisionRecall,
    SSCDSimilarity,
)
from lightning_iet.metrics.features.files import PathLike_

__all__ = ["FurtherMeasures", "Measure", "check_measures"]

Measure = Literal[
    "average_minimum_distance",
    "clean_fid",
    "density_coverage",
    "extraction_attack",
    "membership_inference",
    "mifid",
    "nearest_training_distance",
    "precision_recall",
    "sscd_similarity",
]

_AGAINST_TRAINING: dict[str, Callable[..., Metric]] = {
    "average_minimum_distance": AverageMinimumDistance,
    "extraction_attack": lambda train, features, weights: ExtractionAttack(train),
    "mifid": MiFID,
    "nearest_training_distance": lambda train, features, weights: NearestTrainingDistance(train),  # of pixels
    "sscd_similarity": lambda train, features, weights: SSCDSimilarity(train, weights=weights),
}
_AGAINST_REFERENCE: dict[str, Callable[..., Metric]] = {
    "clean_fid": lambda features, weights: CleanFID(weights, reset_real_features=False),
    "density_coverage": lambda features, weights: DensityCoverage(features, reset_real_features=False),
    "precision_recall": lambda features, weights: PrecisionRecall(features, reset_real_features=False),
}
_PAIRS = ("precision_recall", "density_coverage")  # whose figures are named well enough
_BATCH = 256  # images that go through a feature network at once


def check_measures(measures: Sequence[str]) -> tuple[Measure, ...]:
    """Refuse what is not the name of a measure.

    Returns:
        The names, each once.

    Raises:
        ValueError: naming the first that is unknown.

    Example:
        >>> check_measures(["mifid", "mifid"])
        ('mifid',)
    """
    known = get_args(Measure)
    unknown = [name for name in measures if name not in known]
    if isinstance(measures, str) or unknown:
        found = repr(measures) if isinstance(measures, str) else repr(unknown[0])
        raise ValueError(f"Argument `measures` expected a list of {', '.join(known)}, but got {found}.")
    return tuple(dict.fromkeys(measures))  # type: ignore[arg-type]


class FurtherMeasures:
    """Takes measures of sets of images; all of them are built, and refused, before the first set.

    Args:
        measures: names, see :data:`Measure`. ``"membership_inference"`` is not one of images, and is left out.
        train: the training images, shape ``(N, C, H, W)``.
        reference: further real images, of the same shape, that those of quality compare with.
        features: the network of all measures that let one choose.
        weights: by name of a measure, the weight file of its own network (``clean_fid``, ``sscd_similarity``).

    Raises:
        ValueError: as the measures themselves; or for weights of a measure that is not taken.
        FileNotFoundError: if weights are missing.
        ModuleNotFoundError: if an extra of this package is missing.

    Example:
        >>> images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> network = nn.Flatten()
        >>> measures = FurtherMeasures(["precision_recall"], images[:20], images[20:40], features=network)
        >>> sorted(measures(images[40:]))
        ['precision', 'recall']
    """

    def __init__(
        self,
        measures: Sequence[Measure],
        train: Tensor,
        reference: Tensor,
        *,
        features: nn.Module,
        weights: Mapping[str, PathLike_] | None = None,
    ) -> None:
        weights = dict(weights or {})
        self.metrics: dict[str, Metric] = {}
        for name in measures:
            own: dict[str, Any] = {"features": features, "weights": weights.pop(name, None)}
            if name in _AGAINST_TRAINING:
                self.metrics[name] = _AGAINST_TRAINING[name](train, **own)
            elif name in _AGAINST_REFERENCE:
                self.metrics[name] = _AGAINST_REFERENCE[name](**own)
        if weights:
            raise ValueError(
                f"Argument `measure_weights` expected files for {', '.join(measures) or 'no measure'}, but got one for "
                f"{min(weights)}. Name it in `measures`, or leave the file out."
            )
        for metric in self.metrics.values():
            metric.distributed_available_fn = None  # whoever scores has all images, and must not wait for the others
        self.reference = reference
        self._fed = False

    def to(self, device: torch.device) -> "FurtherMeasures":
        """Move the work to a device."""
        self.metrics = {name: metric.to(device) for name, metric in self.metrics.items()}
        self.device = device
        return self

    def __call__(self, images: Tensor) -> dict[str, float]:
        """Return all figures of a set of images, shape ``(Q, C, H, W)`` in [0, 1], by name."""
        found: dict[str, float] = {}
        for name, metric in self.metrics.items():
            metric.reset()
            real = name in _AGAINST_REFERENCE
            if real and not self._fed:
                _feed(metric, self.reference, real=True)
            _feed(metric, images, **({"real": False} if real else {}))
            found |= _named(name, metric.compute())
        self._fed = True
        return found


@torch.no_grad()
def _feed(metric: Metric, images: Tensor, **kind: bool) -> None:
    for batch in images.split(_BATCH):
        metric.update(batch.to(metric.device), **kind)


def _named(measure: str, figures: Tensor | Mapping[str, Tensor]) -> dict[str, float]:
    if isinstance(figures, Tensor):
        return {measure: float(figures)}
    prefix = "" if measure in _PAIRS else f"{measure}_"
    return {f"{prefix}{name}": float(figure) for name, figure in figures.items()}
