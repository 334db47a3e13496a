"""Measures of sets of images, by their names: how good they are, and how close to the training images."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchmetrics import Metric

from lightning_iet.data.samples import labels_of
from lightning_iet.evaluation.membership import choose_images, mean_losses, noise_of, spread_timesteps
from lightning_iet.functional.checks import unit_interval
from lightning_iet.functional.membership_inference import membership_inference
from lightning_iet.functional.text_norm import text_norm
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
from lightning_iet.metrics.features import PathLike_

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
    "text_norm",
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
_OF_FEATURES = ("average_minimum_distance", "mifid", "density_coverage", "precision_recall")
_PAIRS = ("precision_recall", "density_coverage")  # whose numbers are named well enough
_BATCH = 256  # images that go through a feature network at once


def check_measures(measures: Sequence[str]) -> tuple[Measure, ...]:
    """Refuse what is not the name of a measure.

    Returns:
        The names, each once.

    Raises:
        ValueError: Naming the first that is unknown.

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


def make_metrics(
    measures: Sequence[Measure],
    train: Tensor,
    *,
    features: nn.Module | None,
    weights: Mapping[str, PathLike_] | None = None,
) -> dict[str, Metric]:
    """Build the metrics of measures; what they lack is refused here, before the first set of images.

    Args:
        measures: Names, see :data:`Measure`. ``"membership_inference"`` is not one of images, and is left out.
        train: The training images, shape ``(N, C, H, W)``.
        features: The network of all measures that let one choose; ``None`` = there is none.
        weights: By name of a measure, the weight file of its own network (``clean_fid``, ``sscd_similarity``).

    Raises:
        ValueError: As the metrics themselves; or for weights of a measure that is not taken.
        FileNotFoundError: Weights are missing.
        ModuleNotFoundError: An extra of this package is missing.
    """
    weights = dict(weights or {})
    lacking = [name for name in measures if name in _OF_FEATURES] if features is None else []
    if lacking:
        raise ValueError(
            f"Argument `measures` expected none that compares features, since there is no feature network, but got "
            f"{lacking[0]}. Name a network as `features`, such as efficientnet."
        )
    metrics: dict[str, Metric] = {}
    for name in measures:
        own: dict[str, Any] = {"features": features, "weights": weights.pop(name, None)}
        if name in _AGAINST_TRAINING:
            metrics[name] = _AGAINST_TRAINING[name](train, **own)
        elif name in _AGAINST_REFERENCE:
            metrics[name] = _AGAINST_REFERENCE[name](**own)
    if weights:
        raise ValueError(
            f"Argument `measure_weights` expected files for {', '.join(measures) or 'no measure'}, but got one for "
            f"{min(weights)}. Name it in `measures`, or leave the file out."
        )
    return metrics


class ImageMeasures:
    """Measure sets of images by metrics, some of which compare with real reference images.

    Nothing is computed of the reference images before the first set, and nothing twice.

    Args:
        metrics: By name. Those whose ``update`` takes ``real`` compare with the reference images, and have to be built
            with ``reset_real_features=False``.
        reference: Real images that these compare with, shape ``(N, C, H, W)``.

    Example:
        >>> from lightning_iet.metrics import PrecisionRecall
        >>> images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> metric = PrecisionRecall(nn.Flatten(), reset_real_features=False)
        >>> sorted(ImageMeasures({"precision_recall": metric}, images[20:40]).measure(images[40:]))
        ['precision', 'recall']
    """

    def __init__(self, metrics: Mapping[str, Metric], reference: Tensor) -> None:
        self.metrics = dict(metrics)
        self.reference = reference
        self._fed: set[str] = set()
        for metric in self.metrics.values():
            metric.distributed_available_fn = None  # every process has all images, and must not wait for the others

    def to(self, device: torch.device) -> None:
        """Move the metrics to a device."""
        self.metrics = {name: metric.to(device) for name, metric in self.metrics.items()}

    def measure(self, images: Tensor, *, only: str | None = None) -> dict[str, float]:
        """Return all numbers of a set of images.

        Args:
            images: Shape ``(Q, C, H, W)``, in [0, 1].
            only: Name of the one metric to take.
        """
        found: dict[str, float] = {}
        for name, metric in self.metrics.items() if only is None else [(only, self.metrics[only])]:
            compares = "real" in inspect.signature(metric.update).parameters
            metric.reset()
            if compares and name not in self._fed:
                _feed(metric, self.reference, real=True)
                self._fed.add(name)
            _feed(metric, images, **({"real": False} if compares else {}))
            numbers = metric.compute()
            prefix = "" if name in _PAIRS else f"{name}_"
            if isinstance(numbers, Tensor):
                found[name] = float(numbers)
            else:
                found |= {f"{prefix}{key}": float(number) for key, number in numbers.items()}
        return found


@torch.no_grad()
def _feed(metric: Metric, images: Tensor, **kind: bool) -> None:
    for batch in images.split(_BATCH):
        metric.update(batch.to(metric.device), **kind)


def _choose(images: Dataset[Any], most: int, *, measure: str) -> Tensor:
    """Choose images of a set for a measure, which refuses sets of less than two."""
    total = len(images)  # type: ignore[arg-type]
    if total < 2:
        raise ValueError(
            f"Argument `measures` expected sets of at least 2 images for {measure}, but got {total}. Hold out more "
            "images, or leave this measure out."
        )
    return choose_images(total, most)


class MembershipMeasure:
    """The attack by the loss, as a measure of an evaluation during training.

    Every image has its own noise at 20 timesteps spread over the schedule, the same at every evaluation, so that
    evaluations compare. *(our choice of 20 timesteps and at most 512 images of each set: as much work as sampling 410
    images in 50 steps)*

    Args:
        train: The training set, yielding ``(image in [0, 1], condition, index)``.
        held_out: Images that are not trained on, likewise.

    Raises:
        ValueError: A set has less than two images.
    """

    images = 512  # of each set, at most
    timesteps = 20

    def __init__(self, train: Dataset[Any], held_out: Dataset[Any]) -> None:
        self._sets = []
        for dataset in (train, held_out):
            places = _choose(dataset, self.images, measure="membership_inference")
            chosen = Subset(dataset, places.tolist())  # no other image is read
            self._sets.append((collect_images(chosen), places, labels_of(chosen)))

    def __call__(self, module: Any, *, use_ema: bool) -> dict[str, float]:
        """Return the AUC with its interval, and true positive rates, by the names that loggers know them by.

        Args:
            module: Has ``losses(images, timesteps, noise, use_ema=)`` and ``num_timesteps``, as
                :class:`~lightning_iet.DiffusionModule`.
            use_ema: Whether the averaged weights are attacked.
        """
        timesteps = spread_timesteps(self.timesteps, int(module.num_timesteps))
        conditional = getattr(module, "conditioning", None) is not None
        scores = [
            mean_losses(module, images, places, timesteps, use_ema=use_ema, condition=labels if conditional else None)
            for images, places, labels in self._sets
        ]
        return {f"membership_inference_{name}": float(value) for name, value in membership_inference(*scores).items()}


class TextNorm:
    """Measures how much captions change the predictions of a text-to-image model, on training and held-out images.

    The measure of memorization inside MemControl's search, see :func:`~lightning_iet.functional.text_norm.text_norm`.
    *(our choice: the published one takes a single random timestep for each image, which makes it noise; here it is the
    mean over four timesteps, 0.2, 0.4, 0.6 and 0.8 of the schedule, with the same noise at every evaluation, of at most
    256 images of each set)*

    Args:
        train: the training set, yielding ``(image in [0, 1], caption, index)``.
        held_out: captioned images that are not trained on, likewise.
        num_images: of each set, at most.
        batch_size: images at once.

    Raises:
        ValueError: if a set has less than two images.
    """

    TIMESTEPS = (0.2, 0.4, 0.6, 0.8)

    def __init__(
        self, train: Dataset[Any], held_out: Dataset[Any], *, num_images: int = 256, batch_size: int = 32
    ) -> None:
        self.sets = {"": train, "_control": held_out}
        chosen = {suffix: _choose(images, num_images, measure="text_norm") for suffix, images in self.sets.items()}
        self.places = {suffix: places.split(batch_size) for suffix, places in chosen.items()}

    @torch.no_grad()
    def __call__(self, module: Any, *, use_ema: bool) -> dict[str, float]:
        """Return mean and 0.9-quantile of both sets, and the standard error of the held-out mean.

        Args:
            module: a :class:`~lightning_iet.TextToImageModule`, or one with its ``latents``, ``captions``,
                ``process``, ``num_timesteps`` and ``forward``.
            use_ema: whether the averaged weights predict.
        """
        found: dict[str, float] = {}
        for suffix, images in self.sets.items():
            module.eval()
            norms = torch.cat([self._norms(module, images, part, use_ema) for part in self.places[suffix]])
            found[f"text_norm{suffix}"] = float(norms.mean())
            found[f"text_norm_quantile_90{suffix}"] = float(norms.quantile(0.9))
        found["text_norm_control_standard_error"] = float(norms.std() / len(norms) ** 0.5)
        return found

    def _norms(self, module: Any, images: Dataset[Any], places: Tensor, use_ema: bool) -> Tensor:
        """Mean over the timesteps for each image, float64, shape ``(B,)``."""
        device = next(module.parameters()).device
        batch = [images[place] for place in places.tolist()]
        clean = torch.stack([unit_interval(image) for image, *_ in batch]).to(device)
        captions = module.captions([caption for _, caption, *_ in batch])
        null = captions.replaced(torch.ones(len(batch), dtype=torch.bool, device=device), module.captions.null())
        latents = module.latents(clean, at_mean=True)
        total = torch.zeros(len(batch), dtype=torch.float64, device=device)
        for draw, part in enumerate(self.TIMESTEPS):
            noise = torch.stack([noise_of(place, draw, latents.shape[1:], seed=0) for place in places.tolist()])
            steps = torch.full((len(batch),), int(part * module.num_timesteps), device=device)
            noisy, times = module.process.noised(latents, steps, noise.to(latents))
            conditional, unconditional = (module(noisy, times, words, use_ema=use_ema) for words in (captions, null))
            total += text_norm(conditional, unconditional).double()
        return total.cpu() / len(self.TIMESTEPS)
