"""How close generated images lie to training images: measured once, for Evaluation, audit and benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """

    ratio: Tensor
    mq_ratio: Tensor
    nearest: Tensor

    @classmethod
    def of(cls, sq_distances: Tensor, indices: Tensor) -> "Closeness":
        """Compute the ratios from the k nearest neighbours of each image.

        Args:
            sq_distances: Squared distances in ascending order, shape ``(Q, k)``.
            indices: Positions in the training set, shape ``(Q, k)``.
        """
        return cls(nearest_ratio(sq_distances).cpu(), memorization_ratio(sq_distances).cpu(), indices[:, 0].cpu())

    def count(self, *, limit: float = RATIO, thresholds: Sequence[float] = MQ_THRESHOLDS) -> MemorizationCounts:
        """Count the images that pass for memorized."""
        counts = count_below(self.mq_ratio, thresholds).tolist()
        quantity = {f"{threshold:g}": count for threshold, count in zip(thresholds, counts, strict=True)}
        return MemorizationCounts(len(self.ratio), int(below(self.ratio, limit).sum()), quantity)


def measure_closeness(images: Tensor, train: Tensor, k: int, *, mirrored: bool = False) -> Closeness:
    """Search the training images nearest to each image.

    Args:
        images: Shape ``(Q, C, H, W)``, in [0, 1].
        train: Shape ``(N, C, H, W)``, on the device that is to do the search.
        k: Nearest training images in the mean of the memorized quantity, 2 … N.
        mirrored: Compare each image's mirror image as well, and keep the one that is nearer to a training image, for
            models that were trained on mirrored images.

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
    return Closeness.of(distances[closest, rows], indices[closest, rows])
