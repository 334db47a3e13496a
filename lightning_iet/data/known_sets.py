"""Data sets that everybody knows: scikit-learn's digits, Fashion-MNIST, CIFAR-10 and CIFAR-100."""

import gzip
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

from lightning_iet.data.decoding import Channels
from lightning_iet.data.duplicates import Duplication
from lightning_iet.data.images import ImageDataModule, IndexedImages, absent, damaged, one_line_download
from lightning_iet.data.splits import select_disjoint

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


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
        images, labels = _every_digit()
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


@cache
def _every_digit() -> tuple[Tensor, Tensor]:
    """Images and classes of all digits, of which sets are copies; reading the file takes longer than the rest."""
    from sklearn.datasets import load_digits  # a second of imports that no other data set needs

    pixels, classes = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(classes)


def find_idx(folder: Path, name: str) -> Path | None:
    """Return the file of a name, plain or compressed by gzip; ``None`` if there is none."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path) -> Tensor:
    """Read an idx file of unsigned bytes, the format of MNIST; one whose name ends in ``.gz`` is decompressed.

    Returns:
        uint8, of the shape that the file's header says.

    Raises:
        ValueError: If it is something else, or damaged.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain = path
            if path.suffix == ".gz":  # which torchvision does not read
                plain = Path(folder, path.stem)
                plain.write_bytes(gzip.decompress(path.read_bytes()))
            values = read_sn3_pascalvincent_tensor(str(plain))
        reason = "" if values.dtype == torch.uint8 else f"its values are {values.dtype}"
    except (OSError, EOFError) as error:  # gzip raises both for damaged files
        reason = str(error)
    except (ValueError, KeyError, AssertionError, RuntimeError):  # torchvision, of a header that makes no sense
        reason = "its header does not fit its content"
    if reason:
        raise ValueError(
            f"Argument `root` expected idx files, but got '{path}', which is none or damaged ({reason}). Fetch it "
            "again."
        )
    return values


class FashionMNISTDataModule(ImageDataModule):
    """Fashion-MNIST, 10 classes; its test images are the held-out ones.

    Source: Xiao, Rasul & Vollgraf (2017), https://arxiv.org/abs/1708.07747.

    Args:
        root: Folder with the four idx files, plain or compressed, or with ``FashionMNIST/raw`` as torchvision makes it;
            ``None`` = ``data``, or where Debian's package ``dataset-fashion-mnist`` puts them, if they are only there.
        batch_size: Images in a batch.
        image_size: 32 puts the 28 × 28 pixels into a black frame *(our choice: no pixel changes, and U-Nets can halve
            the size five times)*; other sizes are reached by resizing; ``None`` = 28.
        channels: 1, or 3 for networks that want colours.
        **kwargs: See :class:`~lightning_iet.data.ImageDataModule`.

    Raises:
        FileNotFoundError: In ``setup``, if it is not there.
        ValueError: If its files are damaged.

    Example:
        >>> fashion = FashionMNISTDataModule(synthetic=True)
        >>> fashion.setup("fit")
        >>> fashion.train_set[0][0].shape
        torch.Size([1, 32, 32])
    """

    title: ClassVar[str] = "Fashion-MNIST"
    downloadable: ClassVar[bool] = True
    native_size: ClassVar[tuple[int, int]] = (28, 28)

    def __init__(
        self,
        root: Path | None = None,
        *,
        batch_size: int = 128,
        image_size: int | tuple[int, int] | None = 32,
        channels: Channels = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root, batch_size=batch_size, image_size=image_size, channels=channels, num_classes=10, **kwargs
        )

    def fetch(self) -> None:
        """Download, unless it is there."""
        place = self.root or Path("data")
        if self._folder() is None:
            with one_line_download(self.title, place):
                FashionMNIST(place, download=True)

    def load(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """Training and test images."""
        folder = self._folder()
        if folder is None:
            raise absent(self.title, f"{_FILES[0]}.gz and the other three", self.root or Path("data"))
        images, labels, test_images, test_labels = (read_idx(find_idx(folder, name) or folder) for name in _FILES)
        return self._framed(images, labels), self._framed(test_images, test_labels)

    def _folder(self) -> Path | None:
        """The first place that holds all four files."""
        roots = [Path("data"), DEBIAN] if self.root is None else [self.root]
        places = [place for root in roots for place in (root, root / "FashionMNIST" / "raw")]
        return next((place for place in places if all(find_idx(place, name) for name in _FILES)), None)

    def _framed(self, images: Tensor, labels: Tensor) -> IndexedImages:
        frame = (2, 2, 2, 2) if self.image_size == (32, 32) else (0, 0, 0, 0)
        return IndexedImages(F.pad(images[:, None], frame), labels.long())


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
