"""An evaluation of generated images: how good they are, and how close to training images, beside held-out images."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import ceil, isnan, nan
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_iet.data.augmentation import every_image
from lightning_iet.data.samples import name_of
from lightning_iet.evaluation.measures import ImageMeasures, Measure, make_metrics
from lightning_iet.evaluation.memorization import RATIO, Closeness, measure_closeness
from lightning_iet.evaluation.report import named_figures
from lightning_iet.functional.checks import check_at_least
from lightning_iet.functional.duplicates import Duplicates, duplicate_groups
from lightning_iet.functional.memorization import MQ_THRESHOLDS
from lightning_iet.metrics.base import TrainingSet, collect_images
from lightning_iet.metrics.features import PathLike_
from lightning_iet.metrics.memorization import MemorizedQuantity
from lightning_iet.utilities.progress import progress_bar

_SETS = ("train_set", "control_set", "reference_set")


def check_settings(num_samples: int, sampler: str, **at_least_one: int | None) -> None:
    """Refuse settings of an evaluation that are out of range; ``None`` is what was left out.

    Raises:
        ValueError: naming the setting.
    """
    if num_samples < 0 or num_samples == 1:
        raise ValueError(
            f"Argument `num_samples` expected an integer ≥ 2, or 0 for no evaluation, but got {num_samples}."
        )
    if sampler not in ("ddim", "ddpm", "own"):
        raise ValueError(f"Argument `sampler` expected 'ddim', 'ddpm' or 'own', but got {sampler!r}.")
    check_at_least(1, optional=True, **at_least_one)


def real_sets(datamodule: object) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
    """Return the training, control and reference set from a data module that is set up.

    Raises:
        ValueError: there is no data module, or it lacks one of them.

    Example:
        >>> from lightning_iet import DigitsDataModule
        >>> digits = DigitsDataModule()
        >>> digits.setup("fit")
        >>> [len(images) for images in real_sets(digits)]
        [64, 512, 1221]
        >>> real_sets(None)
        Traceback (most recent call last):
        ...
        ValueError: Argument `datamodule` expected data sets `train_set`, `control_set`, `reference_set` to evaluate ...
    """
    missing = [name for name in _SETS if getattr(datamodule, name, None) is None]
    if missing:
        found = "none" if datamodule is None else f"{type(datamodule).__name__} without `{'`, `'.join(missing)}`"
        raise ValueError(
            f"Argument `datamodule` expected data sets `{'`, `'.join(_SETS)}` to evaluate with, but got {found}. Set"
            " them in its setup() (images to train on, to stand in for generated ones, and for FID), or switch the"
            " evaluation off with num_samples=0."
        )
    train, control, reference = (getattr(datamodule, name) for name in _SETS)
    return every_image(train), control, reference


def check_schedule(module: nn.Module, *, num_inference_steps: int) -> None:
    """Refuse a module that cannot sample images in so many steps.

    Raises:
        ValueError: the noise schedule is shorter.
    """
    most = getattr(module, "num_timesteps", None)
    if isinstance(most, int) and num_inference_steps > most:
        raise ValueError(
            f"Argument `num_inference_steps` expected at most {most}, the timesteps of training, but got"
            f" {num_inference_steps}. Take fewer."
        )


def check_losses(module: nn.Module) -> None:
    """Refuse a module that cannot compute the loss of an image.

    Raises:
        TypeError: it has no method ``losses``, or does not say how many timesteps there are.
    """
    losses = getattr(module, "losses", None)
    of_images = callable(losses) and next(iter(inspect.signature(losses).parameters), "") == "images"
    if not of_images or not hasattr(module, "num_timesteps"):
        raise TypeError(
            "Argument `measures` expected a module with `losses(images, timesteps, noise, use_ema=…)`, `num_timesteps`"
            f" for membership_inference, but got {type(module).__name__}. Write them, or leave this measure out."
        )


def check_captions(module: nn.Module) -> None:
    """Refuses a module that does not predict from captions.

    Raises:
        TypeError: it lacks what :class:`~lightning_iet.evaluation.measures.TextNorm` asks it for.
    """
    missing = [
        name for name in ("latents", "captions", "process", "num_timesteps") if getattr(module, name, None) is None
    ]
    if missing:
        raise TypeError(
            f"Argument `measures` expected a TextToImageModule for text_norm, but got {type(module).__name__}, which "
            f"has no `{missing[0]}`. Leave this measure out."
        )


def check_images(images: Tensor, train: Tensor) -> None:
    """Refuse images, ``(N, C, H, W)``, that cannot be compared with those of training, ``(M, C, H, W)``.

    Raises:
        ValueError: the shapes differ, or a value is NaN or infinite.
    """
    if images.shape[1:] != train.shape[1:]:
        raise ValueError(
            f"Argument `model` expected a module that draws images like those of training, {tuple(train.shape[1:])},"
            f" but got {tuple(images.shape[1:])}. Set the channels and size of its denoiser (`in_channels`,"
            " `sample_size`)."
        )
    if not images.isfinite().all():
        raise ValueError(
            "Argument `model` expected a module that draws finite images, but got NaN or infinite values: its weights"
            " have diverged. Train with a lower learning rate, or with gradient clipping."
        )


def sample_on_all_processes(
    trainer: pl.Trainer, sample: Callable[..., Tensor], num: int, *, batch_size: int, device: torch.device
) -> Tensor:
    """Sample images in equal parts on all processes, with a progress bar on the first.

    Args:
        trainer: its strategy gathers the parts; without a progress bar of its own there is none here either.
        sample: ``sample(num, start=…, batch_size=…) -> (num, C, H, W)`` in [0, 1], where image i depends on
            ``start + i`` alone, so that the result does not depend on the number of processes.
        num: number of images.
        batch_size: at most so many images at once.
        device: where a process' part is gathered from.

    Returns:
        All images on every process, ``(num, C, H, W)`` on the CPU.

    Example:
        >>> trainer = pl.Trainer(accelerator="cpu", enable_progress_bar=False, logger=False)
        >>> count = lambda num, *, start, batch_size: torch.arange(start, start + num).view(-1, 1, 1, 1)
        >>> sample_on_all_processes(trainer, count, 5, batch_size=2, device=torch.device("cpu")).flatten()
        tensor([0, 1, 2, 3, 4])
    """
    part = ceil(num / trainer.world_size)  # equal parts; what is too much is dropped
    first = part * trainer.global_rank
    step = min(batch_size, ceil(part / 8))  # some steps, so that the time left can be told early
    batches = []
    hidden = trainer.progress_bar_callback is None or not trainer.is_global_zero
    with progress_bar("Sampling images", num, hidden=hidden, is_slow=True) as bar:
        for start in range(first, first + part, step):
            batches.append(sample(min(step, first + part - start), start=start, batch_size=step))
            bar.advance(len(batches[-1]) * trainer.world_size)
    own = torch.cat(batches).to(device)
    images = own.new_zeros(part * trainer.world_size, *own.shape[1:])
    images[first : first + part] = own
    # The sum over processes puts the parts together: the others have zeros there, and 0 + x is x.
    return trainer.strategy.reduce(images, reduce_op="sum")[:num].cpu()


@dataclass(frozen=True)
class Scores:
    """The measures of one set of images.

    Attributes:
        num_images: Size of the set.
        fid: Fréchet distance to the reference images in the feature space.
        memorized_fraction: Share with ``d1 / d2`` below the limit.
        mq: ``{threshold: share of images below it}``, the memorized quantity per image.
        further: Further measures, by name.
        copied_fraction: Share with ``d1 / d2`` below the limit where near-duplicates among the training images count as
            one: the sum of the next two.
        copied_fraction_of_repeated: Share that copies a training image with near-duplicates.
        copied_fraction_of_others: Share that copies another training image.
    """

    num_images: int
    fid: float
    memorized_fraction: float
    mq: dict[str, float]
    further: dict[str, float] = field(default_factory=dict)
    copied_fraction: float = 0.0
    copied_fraction_of_repeated: float = 0.0
    copied_fraction_of_others: float = 0.0


@dataclass(frozen=True)
class Assessment:
    """Generated images with their measures.

    Attributes:
        images: Shape ``(Q, C, H, W)``.
        closeness: Of each image.
        scores: Of all together.
    """

    images: Tensor
    closeness: Closeness
    scores: Scores


class Assessor:
    """Measure images against the training images, and against reference images by FID.

    The nearest training images are searched once for all measures of memorization. Nothing is computed before the first
    set of images, and nothing of the real images twice.

    Args:
        train: The training set, ``N`` images ``(C, H, W)`` in [0, 1].
        control: Held-out images that stand in for generated ones: what the measures are without memorization.
        reference: Further held-out images, with which FID compares.
        fid: A Fréchet distance that has seen no image yet; ``None`` = it is not measured, and is NaN.
        k: Nearest training images in the mean of MQ, 2 … N.
        num_control: Use at most so many control images, chosen at random (sets are often sorted by class), because FID
            depends on the number of images and the two columns should have the same. ``None`` = all.
        thresholds: Of MQ.
        limit: Of ``d1 / d2``, below which an image counts as memorized.
        further: Names of further measures.
        measure_weights: Of :func:`~lightning_iet.evaluation.measures.make_metrics`.

    Raises:
        ValueError: A set is empty or has less than two images, ``k`` exceeds the training set, images differ in size.

    Example:
        >>> class Flat(torch.nn.Flatten):
        ...     num_features = 4
        >>> real = torch.rand(90, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> fid = FrechetInceptionDistance(Flat())
        >>> assessor = Assessor(real[:30], real[30:60], real[60:], fid=fid, k=5)
        >>> copies = assessor.assess(real[:30]).scores
        >>> copies.memorized_fraction, round(assessor.control.memorized_fraction, 2), copies.fid == assessor.train_fid
        (1.0, 0.03, True)
    """

    def __init__(
        self,
        train: TrainingSet,
        control: TrainingSet,
        reference: TrainingSet,
        *,
        fid: FrechetInceptionDistance | None,
        k: int = 50,
        num_control: int | None = None,
        thresholds: Sequence[float] = MQ_THRESHOLDS,
        limit: float = RATIO,
        further: Sequence[Measure] = (),
        measure_weights: Mapping[str, PathLike_] | None = None,
    ) -> None:
        self.name = partial(name_of, cast("Dataset[Any]", train))  # of a training image, such as its file
        self.train, control, self.reference = (collect_images(images) for images in (train, control, reference))
        for name, images in (("control_set", control), ("reference_set", self.reference)):
            if len(images) < 2 or images.shape[1:] != self.train.shape[1:]:
                raise ValueError(
                    f"Argument `{name}` expected at least 2 images of the training images' shape"
                    f" {tuple(self.train.shape[1:])}, but got {len(images)} of {tuple(images.shape[1:])}. Hold out more"
                    " images, or convert them."
                )
        MemorizedQuantity(self.train, thresholds=thresholds, k=k)  # refuses what does not fit, with the remedy
        chosen = torch.randperm(len(control), generator=torch.Generator().manual_seed(0))[:num_control]
        self.num_held_out, self._control_images = len(control), control[chosen]
        self.k = k
        self.thresholds = tuple(thresholds)
        self.limit = limit
        metrics: dict[str, Metric] = {}
        if fid is not None:
            fid.inception(self.train[:1])  # refuses images that the features are not made for
            fid.reset_real_features = False
            metrics["fid"] = fid
        network = None if fid is None else fid.inception
        metrics |= make_metrics(further, self.train, features=network, weights=measure_weights)
        self._measures = ImageMeasures(metrics, self.reference)

    def to(self, device: torch.device) -> "Assessor":
        """Move the work to a device; without double precision there (Apple's MPS), it stays on the CPU."""
        device = torch.device("cpu") if device.type == "mps" else device
        self.train = self.train.to(device)
        self._measures.to(device)
        return self

    @cached_property
    def duplicates(self) -> Duplicates:
        """Near-duplicates among the training images."""
        return duplicate_groups(self.train, k=min(50, len(self.train) - 1))

    @cached_property
    def control(self) -> Scores:
        """Scores of the control images."""
        return self.assess(self._control_images).scores

    @cached_property
    def train_fid(self) -> float:
        """FID of the training images themselves: what copying alone would give."""
        return self.fid(self.train)

    @property
    def feature_dimensions(self) -> int | None:
        """Number of features that FID compares; None without FID."""
        fid = self._measures.metrics.get("fid")
        return None if fid is None else len(cast(Tensor, fid.real_features_sum))

    def fid(self, images: Tensor) -> float:
        """Return the Fréchet distance between images, ``(Q, C, H, W)`` with Q >= 2, and the reference."""
        if "fid" not in self._measures.metrics:
            return nan
        return self._measures.measure(images, only="fid")["fid"]

    def assess(self, images: Tensor) -> Assessment:
        """Measure images, ``(Q, C, H, W)`` in [0, 1] with Q >= 2; the results are on the CPU."""
        closeness = measure_closeness(images, self.train, self.k, duplicates=self.duplicates)
        counts = closeness.count(limit=self.limit, thresholds=self.thresholds)
        further = self._measures.measure(images)
        copied = closeness.copied_fractions(limit=self.limit)
        scores = Scores(len(images), further.pop("fid", nan), counts.memorized_fraction, counts.mq, further, **copied)
        return Assessment(images.cpu(), closeness, scores)

    def named(self, scores: Scores) -> dict[str, float]:
        """Return scores under the names that loggers know them by, each with that of the control."""
        values = {"fid_train": self.train_fid, "objective": objective(scores, self.control)}
        values |= named_figures(vars(scores), vars(self.control))
        return {f"eval/{name}": value for name, value in values.items() if not isnan(value)}


def objective(scores: Scores, control: Scores) -> float:
    r"""Return one number for sweeps to minimise: the FID, raised by copies.

    .. math:: \mathrm{FID} \cdot \big(1 + 10 \max(0, m - m_\mathrm{control})\big)

    with the copied fraction m, or the memorized fraction where it is larger *(our choice: every tenth image that is a
    copy counts as one more FID; MiFID, which is raised by copies too, takes even held-out digits for copies)*.

    Example:
        >>> control = Scores(100, fid=1.0, memorized_fraction=0.0, mq={})
        >>> objective(Scores(100, fid=4.0, memorized_fraction=0.2, mq={}), control)
        12.0
    """
    excess = max(
        scores.memorized_fraction - control.memorized_fraction, scores.copied_fraction - control.copied_fraction, 0.0
    )
    return scores.fid * (1 + 10 * excess)
