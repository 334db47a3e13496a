"""The common shape of image data modules: what is trained on, and two held-out sets to judge by."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["ImageDataModule", "IndexedImages", "draw_disjoint"]


class IndexedImages(Dataset[tuple[Tensor, Tensor, int]]):
    """Images in memory; yields ``(image, label, index)``.

    Args:
        images: Float in [0, 1], shape ``(n, C, H, W)``.
        labels: Classes, shape ``(n,)``.

    Raises:
        ValueError: If numbers disagree, or images are not in [0, 1].

    Example:
        >>> image, label, index = IndexedImages(torch.zeros(3, 1, 2, 2), torch.tensor([7, 8, 9]))[1]
        >>> image.shape, int(label), index
        (torch.Size([1, 2, 2]), 8, 1)
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                f"Argument `images` expected shape (n, C, H, W) with one label each, but got {tuple(images.shape)} "
                f"and {len(labels)} labels."
            )
        if len(images) and not (images.isfinite().all() and images.min() >= 0 and images.max() <= 1):
            raise ValueError("Argument `images` expected finite values in [0, 1], but got others. Divide 8-bit by 255.")
        self.images = images
        self.targets = labels

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.images[index], self.targets[index], index

    def __len__(self) -> int:
        return len(self.images)


class ImageDataModule(pl.LightningDataModule):
    """Base of data modules that our evaluation understands; subclasses set three data sets in ``setup``.

    Args:
        batch_size: Images in a batch.
        num_workers: Processes that read ahead.

    Attributes:
        train_set: What the model is trained on, yielding ``(image in [0, 1], label, index)``.
        control_set: Held-out images, put in the place of generated ones: what a figure looks like without memorization.
        reference_set: Further held-out images, which FID compares with.
    """

    train_set: Dataset[Any]
    control_set: Dataset[Any]
    reference_set: Dataset[Any]

    def __init__(self, *, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"Argument `batch_size` expected an integer ≥ 1, but got {batch_size}.")
        if num_workers < 0:
            raise ValueError(f"Argument `num_workers` expected an integer ≥ 0, but got {num_workers}.")
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[Any]:
        """The training images, shuffled."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The control images."""
        return self._loader(self.control_set, shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """The reference images."""
        return self._loader(self.reference_set, shuffle=False)

    def _loader(self, dataset: Dataset[Any], *, shuffle: bool) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def draw_disjoint(labels: Tensor, sizes: Sequence[int], *, seed: int) -> list[Tensor]:
    """Draw disjoint sets of samples, each with the classes in equal shares of what there is.

    Args:
        labels: Classes, shape ``(n,)``.
        sizes: Number of samples of each set; at most n together.
        seed: Seed of the draw.

    Returns:
        One index tensor per set.

    Raises:
        ValueError: If more samples are asked for than there are.

    Example:
        >>> [sorted(drawn.tolist()) for drawn in draw_disjoint(torch.tensor([0, 0, 1, 1]), [2, 2], seed=0)]
        [[0, 3], [1, 2]]
    """
    if sum(sizes) > len(labels) or min(sizes) < 1:
        raise ValueError(
            f"Argument `sizes` expected numbers ≥ 1, together at most {len(labels)}, but got {list(sizes)}."
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    # Sorting by (how many of the class came before, class) deals the classes out in turn.
    classes = labels[order]
    rank = torch.stack([(classes[:i] == classes[i]).sum() for i in range(len(classes))])
    order = order[torch.argsort(rank, stable=True)]
    return list(order[: sum(sizes)].split(list(sizes)))
