"""Any folder of images; class sub-folders become labels."""

from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch.utils.data import Dataset

from lightning_iet.data.sources import FolderSource
from lightning_iet.data.stored import StoredDataModule, StoredSamples
from lightning_iet.utilities.naming import printable

__all__ = ["ImageFiles", "ImageFolderDataModule"]


class ImageFiles(FolderSource):
    """The files of a folder, and below, whose suffix is one of Pillow's; others are left alone.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        suffixes = set(Image.registered_extensions())
        self.names = [name for name in self.names if Path(name).suffix.lower() in suffixes]


class ImageFolderDataModule(StoredDataModule):
    """Images in a folder; if they lie in sub-folders, the first level of these are the classes, in order of name.

    AFHQ's dogs are ``root: afhq/train/dog`` with ``held_out: afhq/val/dog``.

    Args:
        root: The folder.
        held_out: A folder of held-out images with the same classes; ``None`` = hold out some of those in ``root``.
        **kwargs: See :class:`~lightning_iet.data.ImageDataModule`.

    Attributes:
        classes: Names of the classes; empty where images have none.

    Raises:
        FileNotFoundError: In ``setup``, if a folder does not exist.
        ValueError: If it holds no images, or some cannot be used, or some lie beside the classes.

    Example:
        >>> dogs = ImageFolderDataModule(Path("afhq/train/dog"), image_size=64, flip=True, synthetic=True)
        >>> dogs.setup("fit")
        >>> dogs.train_set[0][0].shape
        torch.Size([3, 64, 64])
    """

    title: ClassVar[str] = "the folder"

    def __init__(self, root: Path | None = None, *, held_out: Path | None = None, **kwargs: Any) -> None:
        super().__init__(root, held_out=held_out, **kwargs)
        self.classes: list[str] = []

    def open(self, path: Path, *, argument: str) -> Dataset[Any]:
        """The images of a folder."""
        if not path.is_dir():
            raise ValueError(f"Argument `{argument}` expected {self.expected}, but got '{path}', which is none.")
        source = ImageFiles(path)
        folders = [Path(name).parts[0] if len(Path(name).parts) > 1 else "" for name in source.names]
        if argument == "root":
            self.classes = sorted(set(folders) - {""})
        if not self.classes:
            return StoredSamples(source)
        numbers = {name: number for number, name in enumerate(self.classes)}
        for name, folder in zip(source.names, folders, strict=True):
            if folder not in numbers:
                raise ValueError(
                    f"Argument `{argument}` expected all images in folders named after the classes "
                    f"({', '.join(map(printable, self.classes[:5]))}{', …' if len(self.classes) > 5 else ''}), but got "
                    f"'{printable(name)}'. Move it into one of them, or all images into one folder."
                )
        return StoredSamples(source, [numbers[folder] for folder in folders])
