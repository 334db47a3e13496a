"""CIFAR-10 and CIFAR-100: 50,000 images of 32 × 32 to train on, 10,000 held out."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100

from lightning_iet.data.images import ImageDataModule, IndexedImages, absent, damaged, one_line_download


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10, 10 classes; its test images are the held-out ones.

    Source: Krizhevsky (2009), *Learning Multiple Layers of Features from Tiny Images*,
    https://www.cs.toronto.edu/~kriz/cifar.html. The images lie in memory as 8-bit integers (154 MB).

    Args:
        root: Folder that holds ``cifar-10-batches-py``, as torchvision unpacks it.
        batch_size: Images in a batch.
        **kwargs: See :class:`~lightning_iet.data.ImageDataModule`.

    Raises:
        FileNotFoundError: In ``setup``, if it is not there.
        ValueError: If its files are damaged.

    Example:
        >>> cifar = CIFAR10DataModule(synthetic=True)
        >>> cifar.setup("fit")
        >>> cifar.train_set[3][0].shape, cifar.num_classes
        (torch.Size([3, 32, 32]), 10)
    """

    title: ClassVar[str] = "CIFAR-10"
    downloadable: ClassVar[bool] = True
    dataset: ClassVar[type[Any]] = CIFAR10
    classes: ClassVar[int] = 10

    def __init__(self, root: Path = Path("data"), *, batch_size: int = 128, **kwargs: Any) -> None:
        super().__init__(root, batch_size=batch_size, num_classes=self.classes, **kwargs)

    def fetch(self) -> None:
        """Download, unless it is there."""
        with one_line_download(self.title, self.root):
            self.dataset(self.root, download=True)

    def load(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """Training and test images."""
        return self._read(train=True), self._read(train=False)

    def _read(self, *, train: bool) -> IndexedImages:
        folder = Path(self.root or "", self.dataset.base_folder)
        if not folder.is_dir():
            raise absent(self.title, f"the folder {folder.name}", self.root)
        try:
            stored = self.dataset(self.root, train=train)
        except RuntimeError as error:  # what torchvision raises for a file that is missing or has another checksum
            raise damaged(self.title, folder) from error
        return IndexedImages(torch.from_numpy(stored.data).permute(0, 3, 1, 2), torch.tensor(stored.targets))


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100, 100 classes; otherwise as :class:`CIFAR10DataModule`, in ``cifar-100-python``.

    Args:
        root: Folder that holds ``cifar-100-python``, as torchvision unpacks it.
        batch_size: Images in a batch.
        **kwargs: See :class:`~lightning_iet.data.ImageDataModule`.

    Example:
        >>> cifar = CIFAR100DataModule(synthetic=True)
        >>> cifar.setup("fit")
        >>> cifar.train_set.targets.unique().numel()
        100
    """

    title: ClassVar[str] = "CIFAR-100"
    dataset: ClassVar[type[Any]] = CIFAR100
    classes: ClassVar[int] = 100
