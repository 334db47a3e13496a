"""Further measures that an evaluation can take, by their names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchmetrics import Metric

from lightning_iet.audit.losses import Probing, probe_losses, spread_timesteps
from lightning_iet.data.samples import labels_of
from lightning_iet.functional.membership_inference import membership_inference
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
from lightning_iet.metrics.base import collect_images
from lightning_iet.metrics.features.base import PathLike_

_IMAGES = 512  # of each set, at most
_TIMESTEPS = 20


class Membership:
    """Attacks a module by its loss.

    Every image has its own noise at 20 timesteps spread over the schedule, the same at every evaluation, so that
    evaluations compare. *(our choice of 20 timesteps and at most 512 images of each set: as much work as drawing 200
    images in 50 steps)*

    Args:
        train: the training set, yielding ``(image in [0, 1], condition, index)``.
        held_out: images that are not trained on, likewise.

    Raises:
        ValueError: if the held-out set has less than two images.
    """

    def __init__(self, train: Dataset[Any], held_out: Dataset[Any]) -> None:
        self.sets = tuple(_Probe(images) for images in (train, held_out))

    def __call__(self, module: pl.LightningModule, *, use_ema: bool) -> dict[str, float]:
        """Return the AUC with its interval, and true positive rates, by the names that loggers know them by.

        Args:
            module: has ``losses(images, timesteps, noise, use_ema=)`` and ``num_timesteps``, as
                :class:`~lightning_iet.DiffusionModule`.
            use_ema: whether the averaged weights are attacked.
        """
        scores = (probe.scores(module, use_ema=use_ema) for probe in self.sets)
        return {f"membership_inference_{name}": float(value) for name, value in membership_inference(*scores).items()}


class _Probe:
    """Images of one set, their conditions, and their numbers."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        total = len(dataset)  # type: ignore[arg-type]
        if total < 2:
            raise ValueError(
                "Argument `measures` expected sets of at least 2 images for membership_inference, but got "
                f"{total}. Hold out more images, or leave this measure out."
            )
        self.places = Probing(images=_IMAGES).choose(total)
        chosen = Subset(dataset, self.places.tolist())  # no other image is read
        self.images, self.labels = collect_images(chosen), labels_of(chosen)

    def scores(self, module: pl.LightningModule, *, use_ema: bool) -> Tensor:
        """Mean loss of each image."""
        steps = spread_timesteps(_TIMESTEPS, int(module.num_timesteps))  # type: ignore[arg-type]
        conditional = getattr(module, "conditioning", None) is not None
        found = [
            probe_losses(
                module,
                self.images[part],
                self.places[part],
                steps,
                seed=0,
                use_ema=use_ema,
                condition=self.labels[part] if conditional and self.labels is not None else None,
            )
            for part in torch.arange(len(self.images)).split(256)
        ]
        return torch.cat(found).double().mean(dim=1)


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
