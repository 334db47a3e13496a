"""How good generated images are, and how close to the training images, beside held-out real images."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from typing import Any

import lightning.pytorch as pl
import rich
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_iet.evaluation.measures import FurtherMeasures, Measure
from lightning_iet.functional.memorization import MQ_THRESHOLDS, memorization_ratio, nearest_ratio
from lightning_iet.functional.neighbors import nearest_neighbors
from lightning_iet.metrics.base import TrainingSet, collect_images
from lightning_iet.metrics.features.base import PathLike_
from lightning_iet.metrics.memorized_quantity import MemorizedQuantity

_SETS = ("train_set", "control_set", "reference_set")


def check_settings(num_samples: int, sampler: str, **at_least_one: int | None) -> None:
    """Refuses settings of an evaluation that are out of range; ``None`` is what was left out.

    Raises:
        ValueError: naming the setting.
    """
    if num_samples < 0 or num_samples == 1:
        raise ValueError(
            f"Argument `num_samples` expected an integer ≥ 2, or 0 for no evaluation, but got {num_samples}."
        )
    if sampler not in ("ddim", "ddpm"):
        raise ValueError(f"Argument `sampler` expected 'ddim' or 'ddpm', but got {sampler!r}.")
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise ValueError(f"Argument `{name}` expected an integer ≥ 1, but got {value}.")


def real_sets(datamodule: object) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
    """Takes the training, control and reference set from a data module that is set up.

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
    return train, control, reference


def check_module(module: nn.Module, *, num_inference_steps: int) -> None:
    """Refuses a module that cannot draw images in so many steps.

    Raises:
        TypeError: it has no method ``sample``.
        ValueError: the noise schedule is shorter.
    """
    if not callable(getattr(module, "sample", None)):
        raise TypeError(
            f"Argument `model` expected a module with a method `sample` to evaluate, but got {type(module).__name__}."
            " Use DiffusionModule, write such a method, or switch the evaluation off with num_samples=0."
        )
    most = getattr(module, "num_timesteps", None)
    if isinstance(most, int) and num_inference_steps > most:
        raise ValueError(
            f"Argument `num_inference_steps` expected at most {most}, the timesteps of training, but got"
            f" {num_inference_steps}. Take fewer."
        )


def check_losses(module: nn.Module) -> None:
    """Refuses a module that does not tell the loss of an image.

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


def check_images(images: Tensor, train: Tensor) -> None:
    """Refuses images, ``(N, C, H, W)``, that cannot be compared with those of training, ``(M, C, H, W)``.

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


def draw_images(
    trainer: pl.Trainer, sample: Callable[..., Tensor], num: int, *, batch_size: int, device: torch.device
) -> Tensor:
    """Draws images in equal parts on all processes, with a progress bar on the first.

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
        >>> draw_images(trainer, count, 5, batch_size=2, device=torch.device("cpu")).flatten()
        tensor([0, 1, 2, 3, 4])
    """
    part = ceil(num / trainer.world_size)  # equal parts; what is too much is cut off
    first = part * trainer.global_rank
    step = min(batch_size, ceil(part / 8))  # some steps, so that the time left can be told early
    batches = []
    with _progress_bar(trainer) as progress:
        task = progress.add_task("Drawing images", total=num)
        for start in range(first, first + part, step):
            batches.append(sample(min(step, first + part - start), start=start, batch_size=step))
            progress.advance(task, len(batches[-1]) * trainer.world_size)
            progress.refresh()  # inside a training bar that is still live, nobody else does
    drawn = torch.cat(batches).to(device)
    images = drawn.new_zeros(part * trainer.world_size, *drawn.shape[1:])
    images[first : first + part] = drawn
    # The sum over processes puts the parts together: the others have zeros there, and 0 + x is x.
    return trainer.strategy.reduce(images, reduce_op="sum")[:num].cpu()


def finish_training_bar(trainer: pl.Trainer) -> None:
    """Lets go of the terminal, where Lightning's rich bar would redraw itself under all that is still to be printed."""
    progress = getattr(trainer.progress_bar_callback, "progress", None)
    if isinstance(progress, Progress):
        progress.stop()


def _progress_bar(trainer: pl.Trainer) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TextColumn("elapsed, left"), TimeRemainingColumn())
    hidden = trainer.progress_bar_callback is None or not trainer.is_global_zero
    return Progress(*columns, *left, console=rich.get_console(), transient=True, disable=hidden)


_BATCH = 256  # images that go through the feature network at once


@dataclass(frozen=True)
class Closeness:
    """How close each of Q images lies to the training images.

    Attributes:
        ratio: ``d1 / d2``, distances to the nearest and the second nearest training image, ``(Q,)``.
        mq_ratio: squared distance to the nearest over the mean of the k smallest ones, ``(Q,)``.
        nearest: position of the nearest training image, ``(Q,)``.
    """

    ratio: Tensor
    mq_ratio: Tensor
    nearest: Tensor


@dataclass(frozen=True)
class Scores:
    """The figures of one set of images.

    Attributes:
        num_images: size of the set.
        fid: Fréchet distance to the reference images in the feature space.
        memorized_fraction: share with ``d1 / d2`` below the limit.
        mq: ``{threshold: share of images below it}``, the memorized quantity per image.
        further: figures of the further measures, by name.
    """

    num_images: int
    fid: float
    memorized_fraction: float
    mq: dict[str, float]
    further: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Assessment:
    """Images with all that is known about them.

    Attributes:
        images: ``(Q, C, H, W)``.
        closeness: of each image.
        scores: of all together.
    """

    images: Tensor
    closeness: Closeness
    scores: Scores


class Assessor:
    """Scores images against the training images, and against reference images by FID.

    The nearest training images are looked up once for all measures of memorization. Nothing is computed before the
    first question, and nothing about the real images twice.

    Args:
        train: the training set, ``N`` images ``(C, H, W)`` in [0, 1].
        control: held-out images that stand in for generated ones: what scores look like without memorization.
        reference: further held-out images, with which FID compares.
        fid: a Fréchet distance that has seen no image yet.
        k: nearest training images in the mean of MQ, 2 … N.
        num_control: use at most so many control images, drawn at random (sets are often sorted by class), because FID
            depends on the number of images and the two columns should have the same. ``None`` = all.
        thresholds: of MQ.
        limit: of ``d1 / d2``, below which an image counts as memorized.
        further: names of further measures.
        measure_weights: of :class:`~lightning_iet.evaluation.measures.FurtherMeasures`.

    Raises:
        ValueError: a set is empty or has less than two images, ``k`` exceeds the training set, images differ in size.

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
        fid: FrechetInceptionDistance,
        k: int = 50,
        num_control: int | None = None,
        thresholds: Sequence[float] = MQ_THRESHOLDS,
        limit: float = 1 / 3,
        further: Sequence[Measure] = (),
        measure_weights: Mapping[str, PathLike_] | None = None,
    ) -> None:
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
        self._control_images = control[chosen]
        self.k = k
        self.thresholds = tuple(thresholds)
        self.limit = limit
        fid.inception(self.train[:1])  # refuses images that the features are not made for
        # Whoever scores in a run of several processes has all images, and must not wait for the others.
        fid.distributed_available_fn = None
        fid.reset_real_features = False
        self._fid = fid
        self._further = FurtherMeasures(
            further, self.train, self.reference, features=fid.inception, weights=measure_weights
        )

    def to(self, device: torch.device) -> "Assessor":
        """Moves the work to a device; without double precision there (Apple's MPS), it stays on the CPU."""
        device = torch.device("cpu") if device.type == "mps" else device
        self.train = self.train.to(device)
        self._fid = self._fid.to(device)
        self._further.to(device)
        return self

    @cached_property
    def control(self) -> Scores:
        """Scores of the control images."""
        return self.assess(self._control_images).scores

    @cached_property
    def train_fid(self) -> float:
        """FID of the training images themselves: what copying alone would give."""
        return self.fid(self.train)

    def assess(self, images: Tensor) -> Assessment:
        """Looks up and scores images, ``(Q, C, H, W)`` in [0, 1] with Q >= 2; the results are on the CPU."""
        distances, indices = nearest_neighbors(images.to(self.train.device), self.train, self.k)
        closeness = Closeness(nearest_ratio(distances).cpu(), memorization_ratio(distances).cpu(), indices[:, 0].cpu())
        scores = Scores(
            num_images=len(images),
            fid=self.fid(images),
            memorized_fraction=_share_below(closeness.ratio, self.limit),
            mq={f"{threshold:g}": _share_below(closeness.mq_ratio, threshold) for threshold in self.thresholds},
            further=self._further(images),
        )
        return Assessment(images.cpu(), closeness, scores)

    def named(self, scores: Scores) -> dict[str, float]:
        """Scores under the names that loggers know them by, each with that of the control."""
        values = {"eval/fid_train": self.train_fid, "eval/objective": objective(scores, self.control)}
        for suffix, part in (("", scores), ("_control", self.control)):
            values[f"eval/fid{suffix}"] = part.fid
            values[f"eval/memorized_fraction{suffix}"] = part.memorized_fraction
            values |= {f"eval/mq_{threshold}{suffix}": share for threshold, share in part.mq.items()}
            values |= {f"eval/{name}{suffix}": figure for name, figure in part.further.items()}
        return values

    def fid(self, images: Tensor) -> float:
        """Fréchet distance between images, ``(Q, C, H, W)`` with Q >= 2, and the reference."""
        if self._fid.real_features_num_samples == 0:
            self._feed(self.reference, real=True)
        self._fid.reset()
        self._feed(images, real=False)
        return float(self._fid.compute())

    @torch.no_grad()
    def _feed(self, images: Tensor, *, real: bool) -> None:
        for batch in images.split(_BATCH):
            self._fid.update(batch.to(self.train.device), real=real)


def objective(scores: Scores, control: Scores) -> float:
    r"""One number for sweeps to minimise: the FID, punished for copies.

    .. math:: \mathrm{FID} \cdot \big(1 + 10 \max(0, m - m_\mathrm{control})\big)

    with the memorized fraction m *(our choice: every tenth image that is a copy counts as one more FID; MiFID, which
    punishes too, takes even held-out digits for copies)*.

    Example:
        >>> control = Scores(100, fid=1.0, memorized_fraction=0.0, mq={})
        >>> objective(Scores(100, fid=4.0, memorized_fraction=0.2, mq={}), control)
        12.0
    """
    return scores.fid * (1 + 10 * max(0.0, scores.memorized_fraction - control.memorized_fraction))


def _share_below(ratios: Tensor, threshold: float) -> float:
    return float((ratios < threshold).double().mean())
