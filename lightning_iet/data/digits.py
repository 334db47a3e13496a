"""scikit-learn's handwritten digits: 1,797 images of 8 × 8, shipped with that library."""

from collections.abc import Sequence

import torch

from lightning_iet.data.duplicates import Duplication
from lightning_iet.data.images import ImageDataModule, IndexedImages
from lightning_iet.data.splits import select_disjoint


class DigitsDataModule(ImageDataModule):
    """A small part of the digits to train on, the rest held out. Needs no network and no files.

    A small U-Net memorizes a few dozen images within minutes: this data set shows memorization, and what prevents it,
    on any machine. Source: Alpaydin & Kaynak (1998), *Optical Recognition of
    Handwritten Digits*, https://doi.org/10.24432/C50P49.

    Args:
        num_train: Number of training images, with all classes in nearly equal shares.
        num_control: Number of held-out images that stand in for generated ones.
        batch_size: Images in a batch.
        num_workers: Processes that read ahead; the images lie in memory, so 0 is fastest.
        seed: Seed of the split.
        duplicates, repeated_images, repeats: See :class:`~lightning_iet.data.ImageDataModule`.
        classes: Digits to take; None = all ten. A network can learn some of them first, and be fine-tuned on others.

    Raises:
        ValueError: If there are not that many images, or no such digits.

    Example:
        >>> digits = DigitsDataModule(num_train=64)
        >>> digits.setup("fit")
        >>> len(digits.train_set), len(digits.control_set), len(digits.reference_set)
        (64, 512, 1221)
    """

    def __init__(
        self,
        num_train: int = 64,
        *,
        num_control: int = 512,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        duplicates: Duplication = "keep",
        repeated_images: int = 0,
        repeats: int = 20,
        classes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            duplicates=duplicates,
            repeated_images=repeated_images,
            repeats=repeats,
        )
        if classes is not None and (not classes or not set(classes) <= set(range(10))):
            raise ValueError(f"Argument `classes` expected digits from 0 to 9, at least one, but got {list(classes)}.")
        self.classes = classes
        self.num_train = num_train
        self.num_control = num_control
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Split the images: training, control, and everything else as reference."""
        from sklearn.datasets import load_digits  # a second of imports that no other data set needs

        pixels, classes = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        labels = torch.tensor(classes)
        if self.classes is not None:
            chosen = torch.isin(labels, torch.tensor(list(self.classes)))
            images, labels = images[chosen], labels[chosen]
        rest = len(labels) - self.num_train - self.num_control
        if min(self.num_train, self.num_control) < 1 or rest < 2:
            raise ValueError(
                f"Arguments `num_train` and `num_control` expected numbers ≥ 1 that leave 2 of the {len(labels):,} "
                f"digits for FID, but got {self.num_train:,} and {self.num_control:,}."
            )
        sets = select_disjoint(labels, [self.num_train, self.num_control, rest], seed=self.seed)
        train, self.control_set, self.reference_set = (IndexedImages(images[i], labels[i]) for i in sets)
        self.train_set = self.arrange(train)
