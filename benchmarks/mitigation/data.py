"""The real images, and the sets that a run is trained on and judged by."""

from functools import cache

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.mitigation.rows import Row
from benchmarks.mitigation.settings import Setting
from lightning_iet.data import DrawnByWeight, FashionMNISTDataModule, IndexedImages
from lightning_iet.data.augmentation import Augmented, augment
from lightning_iet.data.duplicates import FirstOfGroups, repeat_images
from lightning_iet.data.samples import RandomFlips
from lightning_iet.data.splits import select_disjoint
from lightning_iet.functional.checks import unit_interval
from lightning_iet.functional.duplicates import duplicate_groups


@cache
def real_images(source: str) -> tuple[Tensor, Tensor]:
    """All images that sets are drawn from, ``(n, 1, H, W)`` in [0, 1] or uint8, and their classes."""
    if source == "digits":
        pixels, classes = load_digits(return_X_y=True)
        return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(classes)
    images, _ = FashionMNISTDataModule().load()
    return images.images, images.targets


@cache
def feature_images(source: str) -> tuple[Tensor, Tensor]:
    """Other images of the same source: those that a network learns its features from."""
    if source == "digits":
        raise ValueError("Argument `source` expected 'fashion_mnist', but got 'digits', whose features are shipped.")
    _, images = FashionMNISTDataModule().load()
    return images.images, images.targets


def kept_occurrences(source: Tensor, *, share: float) -> Tensor:
    """Positions that are left when a share of each image's near-duplicates is removed; its first occurrence stays.

    Example:
        >>> kept_occurrences(torch.tensor([0, 1, 0, 0, 0]), share=0.5)
        tensor([0, 1, 2, 3])
    """
    keep = torch.ones(len(source), dtype=torch.bool)
    for image in source.unique():
        others = (source == image).nonzero().flatten()[1:]
        keep[others[len(others) - int(share * len(others)) :]] = False
    return keep.nonzero().flatten()


class RandomlyAugmented(Dataset):
    """Images of which a share, chosen anew in each draw, is changed by RandAugment of one magnitude.

    ``images`` and ``targets`` are those of the images as they are.
    """

    def __init__(self, dataset: IndexedImages, share: float, magnitude: int) -> None:
        self.dataset, self.share, self.magnitude = dataset, share, magnitude
        self.images, self.targets = dataset.images, dataset.targets

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, *rest = self.dataset[index]
        if torch.rand(()) < self.share:
            image = augment(image, self.magnitude, seed=int(torch.randint(2**31, ())))
        return (image, *rest)


class Sets(pl.LightningDataModule):
    """Disjoint sets, drawn with equal shares of the classes; the seed decides which images they hold.

    Attributes:
        train_set: what the row trains on.
        unseen: images that no row trains on (but the one that is meant to).
        anchor_set: those of them that feed a bank.
        control_set, selection_set, reference_set: held-out images.
        every_image: the whole training set, by which copies are judged; other than ``train_set`` only where a row
            leaves near-duplicates out.
        source: for each of its images the number of the image that it shows; occurrences of one image share it.
        num_once: images that occur once; the sources from ``0`` to ``num_repeated - 1`` occur many times.
    """

    def __init__(self, setting: Setting, row: Row, *, seed: int) -> None:
        super().__init__()
        images, labels = real_images(setting.source)
        num_train = round(setting.num_train * row.train_factor) + setting.num_repeated
        sizes = [setting.num_unseen, setting.num_control, setting.num_selection, setting.num_reference, num_train]
        unseen, control, selection, reference, train = select_disjoint(labels, sizes, seed=seed)
        self.unseen, self.control_set, self.selection_set, self.reference_set = (
            IndexedImages(images[drawn], labels[drawn]) for drawn in (unseen, control, selection, reference)
        )
        drawn = torch.cat([train, unseen]) if row.with_unseen else train
        pixels, self.source = repeat_images(
            unit_interval(images[drawn]),
            repeated=setting.num_repeated,
            repeats=setting.repeats if setting.is_uneven else 1,
            change=setting.change,
            seed=seed,
        )
        self.every_image = IndexedImages(pixels, labels[drawn][self.source])
        self.train_set = self.every_image
        if row.deduplicated:
            kept = kept_occurrences(self.source, share=row.deduplicated)
            self.train_set = IndexedImages(pixels[kept], self.every_image.targets[kept])
        if row.drops_found:
            kept = FirstOfGroups(self.train_set, duplicate_groups(pixels).group).places
            self.train_set = IndexedImages(pixels[kept], self.every_image.targets[kept])
        anchors = unseen[: row.num_anchors]
        self.anchor_set = IndexedImages(images[anchors], labels[anchors]) if row.num_anchors else None
        if row.max_magnitude:
            self.train_set = Augmented(self.train_set)
        if row.randaugment[0]:
            self.train_set = RandomlyAugmented(self.train_set, *row.randaugment)
        self.batch_size = setting.batch_size
        self.drawn: Dataset = RandomFlips(self.train_set) if row.flip else self.train_set
        if dict(row.agc).get("weigh") == "draws":
            self.drawn = DrawnByWeight(self.drawn)

    def train_dataloader(self) -> DataLoader:
        """Training images, shuffled."""
        return DataLoader(self.drawn, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """The unseen images, which early stopping watches."""
        return DataLoader(self.unseen, batch_size=self.batch_size)
