"""What a module's loss gives away of its training images: measured once, for Evaluation, audit and benchmark."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import ttest_ind
from torch import Tensor

from lightning_iet.functional.checks import unit_interval
from lightning_iet.functional.membership_inference import membership_inference
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.devices import full_precision

# --- losses -----------------------------------------------------------------------------------------------------------


def spread_timesteps(count: int, total: int) -> Tensor:
    """Return the middles of equal parts of 0 … T - 1: every part of the noise schedule has the same weight.

    Args:
        count: Number of timesteps; no more than there are.
        total: T.

    Returns:
        Ascending, int64, shape ``(count,)``.

    Example:
        >>> spread_timesteps(4, 1000)
        tensor([125, 375, 625, 875])
    """
    count = min(count, total)
    return torch.tensor([(2 * part + 1) * total // (2 * count) for part in range(count)])


def choose_images(total: int, most: int | None, *, seed: int = 0) -> Tensor:
    """Choose images at random, because sets are often sorted by class.

    Args:
        total: Number of images.
        most: At most so many are chosen; ``None`` = all.
        seed: Of the choice.

    Returns:
        Their positions, ascending, shape ``(n,)``.

    Example:
        >>> choose_images(3, 3), len(choose_images(100, 3))
        (tensor([0, 1, 2]), 3)
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[:most].sort().values


def noise_of(index: int, number: int, shape: torch.Size, *, seed: int) -> Tensor:
    """Return one of the noises of an image: it depends on the image's position in its set, whichever set that is.

    Args:
        index: Position of the image.
        number: Number of its timestep.
        shape: ``(C, H, W)``.
        seed: Seed of the measurement.

    Returns:
        Standard normal, shape ``(C, H, W)``, on the CPU.
    """
    # 1 + number, for zeros at the end do not count: (seed, index, 0) is the seed of the sampled image `index`.
    return torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed(seed, index, 1 + number)))


def losses_at(
    module: Any,
    images: Tensor,
    places: Tensor,
    timesteps: Tensor,
    *,
    seed: int = 0,
    use_ema: bool = True,
    condition: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Measure the loss of images at several timesteps, each with noise of its own, in one batch for each timestep.

    Args:
        module: Has ``losses(images, timesteps, noise, use_ema=)``, as :class:`~lightning_iet.DiffusionModule`; it is in
            eval mode meanwhile.
        images: uint8, or floating point in [0, 1], shape ``(B, C, H, W)``.
        places: Their positions in their set, shape ``(B,)``, which the noise depends on.
        timesteps: Shape ``(J,)``.
        seed: Of the noise.
        use_ema: Whether the averaged weights are measured.
        condition: Labels of the images, for a module that takes conditions.
        progress: Called with the number of images that are as good as done.

    Returns:
        Shape ``(B, J)``, on the CPU.
    """
    device = next(module.parameters()).device
    clean = unit_interval(images).to(device)
    options = {} if condition is None else {"condition": condition.to(device)}
    training, losses = module.training, []
    module.eval()
    try:
        with torch.no_grad(), full_precision(device.type):
            for number, timestep in enumerate(timesteps.to(device)):
                noise = [noise_of(index, number, clean.shape[1:], seed=seed) for index in places.tolist()]
                found = module.losses(
                    clean, timestep.expand(len(clean)), torch.stack(noise).to(clean), use_ema=use_ema, **options
                )
                losses.append(found.cpu())
                if progress is not None:
                    progress(len(places) * (number + 1) // len(timesteps))
    finally:
        module.train(training)
    return torch.stack(losses, dim=1)


def mean_losses(
    module: Any,
    images: Tensor,
    places: Tensor,
    timesteps: Tensor,
    *,
    use_ema: bool = True,
    condition: Tensor | None = None,
) -> Tensor:
    """Measure the mean loss of each image, 256 images at a time; see :func:`losses_at`.

    Returns:
        float64, shape ``(B,)``, on the CPU.
    """
    parts = torch.arange(len(images)).split(256)
    conditions = [None if condition is None else condition[part] for part in parts]
    found = [
        losses_at(module, images[part], places[part], timesteps, use_ema=use_ema, condition=labels)
        for part, labels in zip(parts, conditions, strict=True)
    ]
    return torch.cat(found).double().mean(dim=1)


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimestepGap:
    """How much lower the loss of training images is at one timestep.

    Attributes:
        timestep: 0 … T - 1.
        train: Mean loss of the training images.
        held_out: Mean loss of the held-out images.
        gap: ``held_out - train``.
        low: Lower end of its 95 % interval (Welch).
        high: Upper end.
    """

    timestep: int
    train: float
    held_out: float
    gap: float
    low: float
    high: float


@dataclass(frozen=True)
class Membership:
    """How well an attacker who sees losses tells training images from others.

    Attributes:
        train: Training images whose loss was measured.
        held_out: Held-out images likewise.
        auc: How often a training image has a lower mean loss than a held-out one; 0.5 is chance.
        auc_low: Lower end of DeLong's 95 % interval.
        auc_high: Upper end.
        true_positive_rates: By false positive rate the share of training images that are found.
        timesteps: The gap at each timestep.
        labels_given: Whether losses are those of a model that was given the images' labels; ``None`` = it takes none.
    """

    train: int
    held_out: int
    auc: float
    auc_low: float
    auc_high: float
    true_positive_rates: dict[str, float]
    timesteps: list[TimestepGap]
    labels_given: bool | None = None


def infer_membership(
    train: Tensor, held_out: Tensor, timesteps: Tensor, *, labels_given: bool | None = None
) -> Membership:
    """Attack by the loss, and compare losses timestep by timestep.

    The score of an image is the plain mean of its losses *(our choice: on a model that had begun to memorize 100 digits
    its AUC was 0.84, against 0.69 with every timestep in units of its own mean)*.

    Args:
        train: Losses of training images, shape ``(M, J)``.
        held_out: Losses of held-out images at the same timesteps, shape ``(N, J)``.
        timesteps: The timesteps, shape ``(J,)``.
        labels_given: To put on record, see :class:`Membership`.

    Raises:
        ValueError: A set holds fewer than two images, or a loss is not finite.

    Example:
        >>> import torch
        >>> train, held_out = torch.tensor([[0.1], [0.2], [0.6]]), torch.tensor([[0.5], [0.6], [0.7]])
        >>> found = infer_membership(train, held_out, torch.tensor([500]))
        >>> round(found.auc, 3), round(found.timesteps[0].gap, 3)
        (0.833, 0.3)
    """
    for name, losses in (("train", train), ("held_out", held_out)):
        if len(losses) < 2:
            raise ValueError(
                f"Argument `{name}` expected at least 2 images to compare losses of, but got {len(losses)}."
            )
        broken = ~losses.isfinite().all(dim=1)
        if broken.any():
            raise ValueError(
                f"Argument `{name}` expected images with a finite loss, but got NaN or infinity for {broken.sum()} of "
                f"{len(losses)}. The model is broken: use a checkpoint before it diverged."
            )
    scores = [losses.double().mean(dim=1) for losses in (train, held_out)]
    found = {name: float(value) for name, value in membership_inference(*scores).items()}
    auc = (found.pop("auc"), found.pop("auc_low"), found.pop("auc_high"))
    rates = {name.removeprefix("tpr@"): value for name, value in found.items()}
    means = [losses.double().mean(dim=0) for losses in (train, held_out)]
    welch = ttest_ind(held_out.double().numpy(), train.double().numpy(), axis=0, equal_var=False)
    interval = welch.confidence_interval(0.95)
    columns = (timesteps, *means, means[1] - means[0], interval.low, interval.high)
    gaps = [TimestepGap(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    return Membership(len(train), len(held_out), *auc, rates, gaps, labels_given)
