"""How good generated images are, and how close to the training images, beside held-out real images."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_iet.functional.memorization import MQ_THRESHOLDS, memorization_ratio, nearest_ratio
from lightning_iet.functional.neighbors import nearest_neighbors

__all__ = ["Assessor", "Closeness", "Scores", "fingerprint", "load_images"]

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
    """

    num_images: int
    fid: float
    memorized_fraction: float
    mq: dict[str, float]


class Assessor:
    """Scores images against the training images, and against reference images by FID.

    Distances are computed once for all measures of memorization, on the device of ``train``.

    Args:
        train: the training images, ``(N, C, H, W)`` in [0, 1].
        reference: held-out images that FID compares with, ``(M, C, H, W)``.
        fid: a Fréchet distance that has seen no image yet.
        k: nearest training images in the mean of MQ, 2 … N.
        thresholds: of MQ.
        limit: of ``d1 / d2``, below which an image counts as memorized.

    Example:
        >>> class Flat(nn.Flatten):
        ...     num_features = 4
        >>> images = torch.rand(60, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> fid = FrechetInceptionDistance(Flat(), normalize=True)
        >>> assessor = Assessor(images[:20], images[20:40], fid=fid, k=5)
        >>> copies, held_out = assessor.scores(images[:20]), assessor.scores(images[40:])
        >>> copies.memorized_fraction, held_out.memorized_fraction, round(held_out.fid, 2)
        (1.0, 0.0, 0.05)
    """

    def __init__(
        self,
        train: Tensor,
        reference: Tensor,
        *,
        fid: FrechetInceptionDistance,
        k: int = 50,
        thresholds: Sequence[float] = MQ_THRESHOLDS,
        limit: float = 1 / 3,
    ) -> None:
        self.train = train
        self.k = k
        self.thresholds = thresholds
        self.limit = limit
        self._fid = fid.to(train.device)
        self._fid.reset_real_features = False
        self._fid.sync_on_compute = False
        self._update(reference, real=True)

    def closeness(self, images: Tensor) -> Closeness:
        """Looks up the nearest training images.

        Args:
            images: ``(Q, C, H, W)`` in [0, 1], on any device.

        Returns:
            Figures of each image, on the CPU.
        """
        distances, indices = nearest_neighbors(images.to(self.train.device), self.train, self.k)
        return Closeness(nearest_ratio(distances).cpu(), memorization_ratio(distances).cpu(), indices[:, 0].cpu())

    def fid(self, images: Tensor) -> float:
        """Fréchet distance between images, ``(Q, C, H, W)`` with Q >= 2, and the reference."""
        self._fid.reset()
        self._update(images, real=False)
        return float(self._fid.compute())

    def scores(self, images: Tensor, closeness: Closeness | None = None) -> Scores:
        """Scores a set of images.

        Args:
            images: ``(Q, C, H, W)`` in [0, 1].
            closeness: theirs, if it is known already.
        """
        closeness = closeness or self.closeness(images)
        return Scores(
            num_images=len(images),
            fid=self.fid(images),
            memorized_fraction=_share_below(closeness.ratio, self.limit),
            mq={f"{threshold:g}": _share_below(closeness.mq_ratio, threshold) for threshold in self.thresholds},
        )

    @torch.no_grad()
    def _update(self, images: Tensor, *, real: bool) -> None:
        for batch in images.split(_BATCH):
            self._fid.update(batch.to(self.train.device), real=real)


def load_images(dataset: Dataset[Any], *, limit: int | None = None, seed: int = 0) -> Tensor:
    """Reads the images of a data set into memory.

    Args:
        dataset: yields tuples whose first item is an image ``(C, H, W)`` in [0, 1].
        limit: at most so many, drawn at random, for sets are often sorted by class. ``None`` = all, in their order.
        seed: of that draw.

    Returns:
        ``(N, C, H, W)``.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> load_images(TensorDataset(torch.rand(5, 1, 2, 2), torch.arange(5)), limit=3).shape
        torch.Size([3, 1, 2, 2])
    """
    size = len(dataset)  # type: ignore[arg-type]
    order = list(range(size))
    if limit is not None and limit < size:
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:limit].tolist()
    return torch.cat([batch[0] for batch in DataLoader(dataset, batch_size=_BATCH, sampler=order)])


def fingerprint(images: Tensor) -> str:
    """Names a set of images by its content (8 bits per value), so that runs on different sets are told apart.

    Example:
        >>> fingerprint(torch.zeros(2, 1, 2, 2))
        '...'
    """
    content = images.mul(255).round().to(torch.uint8).cpu().numpy()
    return hashlib.sha256(f"{content.shape}".encode() + content.tobytes()).hexdigest()[:16]


def _share_below(ratios: Tensor, threshold: float) -> float:
    return float((ratios < threshold).double().mean())
