"""How close generated images lie to training images: measured once, for Evaluation, audit and benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_iet.functional.duplicates import Duplicates, nearest_of_two_groups
from lightning_iet.functional.memorization import MQ_THRESHOLDS, count_below, memorization_ratio, nearest_ratio
from lightning_iet.functional.neighbors import nearest_neighbors

RATIO = 1 / 3  # of d1 / d2, as published


def below(ratios: Tensor, threshold: float) -> Tensor:
    """Tell which ratios lie below a threshold, in float32 as :func:`count_below` does.

    Example:
        >>> below(torch.tensor([0.3, 0.4]), 0.4)
        tensor([ True, False])
    """
    return ratios < ratios.new_tensor(threshold)


@dataclass(frozen=True)
class MemorizationCounts:
    """How many of a set of images pass for memorized.

    Attributes:
        total: Number of images.
        memorized: Those with ``d1 / d2`` below a limit.
        quantity: By threshold, as ``"0.15"``, those whose ratio of the memorized quantity lies below it.
    """

    total: int
    memorized: int
    quantity: dict[str, int]

    @property
    def memorized_fraction(self) -> float:
        """Share of the images with ``d1 / d2`` below the limit."""
        return self.memorized / self.total

    @property
    def mq(self) -> dict[str, float]:
        """By threshold the memorized quantity as a share of the images."""
        return {threshold: count / self.total for threshold, count in self.quantity.items()}


@dataclass(frozen=True)
class Closeness:
    """How close each of Q images lies to the training images.

    Attributes:
        ratio: ``d1 / d2``, distances to the nearest and the second nearest training image, shape ``(Q,)``.
        mq_ratio: Squared distance to the nearest over the mean of the k smallest ones, shape ``(Q,)``.
        nearest: Position of the nearest training image, shape ``(Q,)``.
        distinct_ratio: As ``ratio``, with near-duplicates among the training images counted as one, shape ``(Q,)``: a
            copy of an image that occurs often lies as near to the next occurrence, and only this ratio sees it.
        of_repeated: Whether the nearest training image has near-duplicates, bool, shape ``(Q,)``.
    """

    ratio: Tensor
    mq_ratio: Tensor
    nearest: Tensor
    distinct_ratio: Tensor | None = None
    of_repeated: Tensor | None = None

    @property
    def copy_ratio(self) -> Tensor:
        """The ratio that copies are told by: near-duplicates count as one image where they are known."""
        return self.ratio if self.distinct_ratio is None else self.distinct_ratio

    def copied_fractions(self, *, limit: float = RATIO) -> dict[str, float]:
        """Return the shares of images whose distinct ratio lies below the limit: all, of repeated images, of others.

        Example:
            >>> ratio, repeated = torch.tensor([0.1, 0.2, 0.9, 0.1]), torch.tensor([True, False, True, True])
            >>> Closeness(ratio, ratio, torch.zeros(4), ratio, repeated).copied_fractions()
            {'copied_fraction': 0.75, 'copied_fraction_of_repeated': 0.5, 'copied_fraction_of_others': 0.25}
        """
        copied = below(self.copy_ratio, limit)
        repeated = torch.zeros_like(copied) if self.of_repeated is None else self.of_repeated
        parts = {"": copied, "_of_repeated": copied & repeated, "_of_others": copied & ~repeated}
        return {f"copied_fraction{name}": float(part.double().mean()) for name, part in parts.items()}

    def count(self, *, limit: float = RATIO, thresholds: Sequence[float] = MQ_THRESHOLDS) -> MemorizationCounts:
        """Count the images that pass for memorized."""
        counts = count_below(self.mq_ratio, thresholds).tolist()
        quantity = {f"{threshold:g}": count for threshold, count in zip(thresholds, counts, strict=True)}
        return MemorizationCounts(len(self.ratio), int(below(self.ratio, limit).sum()), quantity)


def measure_closeness(
    images: Tensor, train: Tensor, k: int, *, mirrored: bool = False, duplicates: Duplicates | None = None
) -> Closeness:
    """Search the training images nearest to each image.

    Args:
        images: Shape ``(Q, C, H, W)``, in [0, 1].
        train: Shape ``(N, C, H, W)``, on the device that is to do the search.
        k: Nearest training images in the mean of the memorized quantity, 2 … N.
        mirrored: Compare each image's mirror image as well, and keep the one that is nearer to a training image, for
            models that were trained on mirrored images.
        duplicates: Near-duplicates among the training images; ``None`` counts every image for itself.

    Returns:
        The ratios, on the CPU.

    Example:
        >>> train = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> measure_closeness(train[:3].flip(-1), train, 5, mirrored=True).count().memorized
        3
    """
    versions = [images, images.flip(-1)] if mirrored else [images]
    found = [nearest_neighbors(version.to(train.device), train, k) for version in versions]
    distances, indices = (torch.stack(parts) for parts in zip(*found, strict=True))
    closest = distances[:, :, 0].argmin(0)
    rows = torch.arange(len(images), device=closest.device)
    distances, indices = distances[closest, rows], indices[closest, rows]
    nearest, mean = nearest_ratio(distances), memorization_ratio(distances)
    closeness = Closeness(nearest.cpu(), mean.cpu(), indices[:, 0].cpu())
    if duplicates is None or not duplicates.members or duplicates.largest == len(train):
        return closeness
    nearest_version = torch.stack([version.to(train.device) for version in versions])[closest, rows]
    group = duplicates.group.to(train.device)
    pairs, _ = nearest_of_two_groups(nearest_version.flatten(1), train.flatten(1), group, found=(distances, indices))
    repeated = (duplicates.group.bincount() > 1)[duplicates.group]
    return replace(closeness, distinct_ratio=nearest_ratio(pairs).cpu(), of_repeated=repeated[closeness.nearest])
