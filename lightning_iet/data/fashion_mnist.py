"""Fashion-MNIST: 60,000 grey images of clothes to train on, 10,000 held out."""

import gzip
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.datasets import FashionMNIST
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

from lightning_iet.data.decoding import Channels
from lightning_iet.data.images import ImageDataModule, IndexedImages, absent, one_line_download


def find_idx(folder: Path, name: str) -> Path | None:
    """Return the file of a name, plain or compressed by gzip; ``None`` if there is none."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path) -> Tensor:
    """Read an idx file of unsigned bytes, the format of MNIST.

    Args:
        path: The file, compressed by gzip if its name ends in ``.gz``.

    Returns:
        uint8, of the shape that the header says.

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


DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


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
