"""Folders of images, with labels or captions."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iet.data.images import ImageDataModule
from lightning_iet.data.samples import Skip, listed
from lightning_iet.data.sources import Data, FolderSource, Source, with_pages
from lightning_iet.utilities.files import printable

log = logging.getLogger(__name__)


class StoredSamples(Dataset[tuple[Data, Any]]):
    """Images of a source with their conditions; yields ``(image as it is stored, condition)``.

    Args:
        source: Where images are read.
        conditions: By position in the source: classes, or captions; ``None`` for an image that has neither, which is
            left out. No list at all = no image has any.
        missing: Why an image without one cannot be used.

    Attributes:
        targets: Classes; only where conditions are.
        skipped: Images that were left out.

    Example:
        >>> from lightning_iet.data.sources import ArraySource
        >>> import numpy as np
        >>> stored = StoredSamples(ArraySource(np.zeros((3, 8, 8), np.uint8)), [7, None, 9], missing="no label")
        >>> len(stored), stored[1][1], stored.targets, stored.skipped
        (2, 9, tensor([7, 9]), [Skip(name='1', reason='no label')])
    """

    targets: Tensor

    def __init__(
        self,
        source: Source,
        conditions: Sequence[int | str | None] | None = None,
        *,
        missing: str = "no condition",
    ) -> None:
        self.source = source
        found: Sequence[int | str | None] = [0] * len(source) if conditions is None else conditions
        self.positions = [position for position, condition in enumerate(found) if condition is not None]
        self.conditions = [condition for condition in found if condition is not None]
        self.skipped = [Skip(source.name(position), missing) for position, c in enumerate(found) if c is None]
        if conditions is not None and self.conditions and isinstance(self.conditions[0], int):
            self.targets = torch.tensor(self.conditions)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Data, Any]:
        return self.source.read(self.positions[index]), self.conditions[index]

    def name(self, index: int) -> str:
        """Return the name of a sample for messages."""
        return self.source.name(self.positions[index])


class StoredDataModule(ImageDataModule):
    """Base of data modules for images stored in files; a subclass opens them.

    Args:
        root: Where it is.
        held_out: Where held-out images are, stored in the same way; ``None`` = hold out some of those in ``root``.
        **kwargs: See :class:`~lightning_iet.data.ImageDataModule`.
    """

    expected: ClassVar[str] = "a folder of images"

    def __init__(self, root: Path | None = None, *, held_out: Path | None = None, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.held_out = None if held_out is None else Path(held_out)

    def load(self) -> Dataset[Any] | tuple[Dataset[Any], Dataset[Any]]:
        """Open the training images, and the held-out ones."""
        if self.root is not None and self.held_out is not None and self.held_out.exists():
            inner, outer = sorted((self.held_out.resolve(), self.root.resolve()), key=lambda path: -len(path.parts))
            if inner.is_relative_to(outer):
                raise ValueError(
                    f"Argument `held_out` expected a place beside `root`, but got '{self.held_out}' and '{self.root}', "
                    "one in the other: the model would be trained on images that are to be held out."
                )
        train = self._checked("root", self.root)
        return train if self.held_out is None else (train, self._checked("held_out", self.held_out))

    def _checked(self, argument: str, path: Path | None) -> Dataset[Any]:
        if path is None or not path.exists():
            found = "None" if path is None else f"{str(path)!r}, which does not exist"
            raise FileNotFoundError(
                f"Argument `{argument}` expected {self.expected}, but got {found}. Give the right path, or try with "
                "random images by `synthetic: true`."
            )
        return self.open(path, argument=argument)

    def open(self, path: Path, *, argument: str) -> Dataset[Any]:
        """Open the images at a path that exists.

        Args:
            path: Where they are.
            argument: The name under which the user gave it: ``"root"`` is opened first, then ``"held_out"``.
        """
        raise NotImplementedError


class ImageFiles(FolderSource):
    """The files of a folder and below whose suffix is one of Pillow's.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        suffixes = set(Image.registered_extensions())
        self.names = [name for name in self.names if Path(name).suffix.lower() in suffixes]


class ImageFolderDataModule(StoredDataModule):
    """Images in a folder; if they lie in sub-folders, the first level of these are the classes, in order of name.

    Every page of a file is an image, such as the slices of a TIFF stack.

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
        """Open the images of a folder."""
        if not path.is_dir():
            raise ValueError(f"Argument `{argument}` expected {self.expected}, but got '{path}', which is none.")
        source = with_pages(ImageFiles(path))
        names = [source.name(index) for index in range(len(source))]
        folders = [Path(name).parts[0] if len(Path(name).parts) > 1 else "" for name in names]
        if argument == "root":
            self.classes = sorted(set(folders) - {""})
        if not self.classes:
            return StoredSamples(source)
        numbers = {name: number for number, name in enumerate(self.classes)}
        for name, folder in zip(names, folders, strict=True):
            if folder not in numbers:
                raise ValueError(
                    f"Argument `{argument}` expected all images in folders named after the classes "
                    f"({', '.join(map(printable, self.classes[:5]))}{', …' if len(self.classes) > 5 else ''}), but got "
                    f"'{printable(name)}'. Move it into one of them, or all images into one folder."
                )
        return StoredSamples(source, [numbers[folder] for folder in folders])


_CAPTION_FILES = ("metadata.jsonl", "captions.jsonl", "captions.json")
_NAME_KEYS = ("file_name", "image", "file", "path")
_TEXT_KEYS = ("text", "caption", "captions", "prompt")


def read_captions(path: Path) -> dict[str, str]:
    """Read the captions of a ``.jsonl`` file, or of a ``.json`` file.

    A ``.jsonl`` file holds an object per line, such as ``{"file_name": "a.png", "text": "a dog"}``, the form of Hugging
    Face's image folders. A ``.json`` file holds ``{"a.png": "a dog"}`` or ``{"a.png": ["a dog", "dog on grass"]}``, the
    form of LAION-10k in studies of replication, or a list of objects as above. Of several captions the first is taken
    *(our choice: the one that those studies train with)*. The loader of ``datasets`` for image folders reads the first
    form alone, and leaves images without a caption out without a word.

    Args:
        path: The file.

    Returns:
        ``{name of the image: caption}``; an image whose caption is empty has none.

    Raises:
        ValueError: If it is something else, naming the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            entries: Any = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            entries = json.loads(text)
        pairs = entries.items() if isinstance(entries, Mapping) else [_pair(entry) for entry in entries]
        captions = {str(name): _first_caption(found) for name, found in pairs}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"Argument `captions` expected a .jsonl file with `file_name` and `text`, or a .json file "
            f"{{name: captions}}, but got '{path}', which is something else ({reason})."
        ) from error
    return {name: caption for name, caption in captions.items() if caption}


def _pair(entry: Mapping[str, Any]) -> tuple[str, Any]:
    """Name and captions in an object of a file."""
    name = next((entry[key] for key in _NAME_KEYS if key in entry), None)
    if name is None:
        raise KeyError(f"an entry has none of {', '.join(_NAME_KEYS)}")
    return name, next((entry[key] for key in _TEXT_KEYS if entry.get(key)), "")


def _first_caption(captions: Any) -> str:
    caption = captions[0] if isinstance(captions, list) and captions else captions or ""
    if not isinstance(caption, str):
        raise TypeError(f"a caption is {type(caption).__name__}, not text")
    return caption.strip()


class CaptionFile:
    """Finds the caption of an image, and captions without an image.

    Files made elsewhere often name images by paths of that machine: an image is looked up by its path below the folder,
    or else by the end of a name, where no other name ends in the same way.

    Args:
        captions: ``{name: caption}``.

    Example:
        >>> file = CaptionFile({"/home/x/train/a.png": "a dog", "b.png": "a cat"})
        >>> file.of("a.png"), file.of("b.png"), file.of("c.png"), file.unused
        ('a dog', 'a cat', None, [])
    """

    def __init__(self, captions: Mapping[str, str]) -> None:
        self.captions = captions
        self._ends: dict[str, str | None] = {}
        for name in captions:
            parts = PurePosixPath(name).parts
            for start in range(len(parts)):
                end = str(PurePosixPath(*parts[start:]))
                self._ends[end] = None if end in self._ends else name
        self._used: set[str] = set()

    def of(self, name: str) -> str | None:
        """Return the caption of an image, by its path below the folder."""
        named = name if name in self.captions else self._ends.get(PurePosixPath(name).as_posix())
        if named is None:
            return None
        self._used.add(named)
        return self.captions[named]

    @property
    def unused(self) -> list[str]:
        """Return the names for which no image has been looked up."""
        return [name for name in self.captions if name not in self._used]


class CaptionFolderDataModule(StoredDataModule):
    """Images with captions: ``metadata.jsonl``, or the JSON of captions that LAION-10k comes with.

    Images without a caption are named and counted like images that cannot be read; captions without an image too, but
    they stop nothing.

    Args:
        root: Folder of the images, and of those below.
        captions: The file of captions, see :func:`~lightning_iet.data.folders.read_captions`; ``None`` =
            ``metadata.jsonl``, ``captions.jsonl`` or ``captions.json`` in the folder.
        held_out: A folder of held-out images with captions; ``None`` = hold out some of those in ``root``.
        held_out_captions: The file of theirs.
        **kwargs: See :class:`~lightning_iet.data.ImageDataModule`.

    Raises:
        FileNotFoundError: In ``setup``, if the folder or the file does not exist.
        ValueError: If some images cannot be used.

    Example:
        >>> laion = CaptionFolderDataModule(Path("laion_10k/train"), image_size=16, synthetic=True)
        >>> laion.setup("fit")
        >>> laion.train_set[0][1]
        'synthetic image ...'
    """

    title: ClassVar[str] = "the folder"
    captioned = True

    def __init__(
        self,
        root: Path | None = None,
        *,
        captions: Path | None = None,
        held_out: Path | None = None,
        held_out_captions: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, held_out=held_out, **kwargs)
        self.captions = {"root": captions, "held_out": held_out_captions}

    def open(self, path: Path, *, argument: str) -> Dataset[Any]:
        """Open the images of a folder, with their captions."""
        file = CaptionFile(read_captions(self._file(path, argument)))
        source = ImageFiles(path)
        conditions = [file.of(name) for name in source.names]
        if file.unused:  # no error, for one file may hold the captions of several folders
            lost = [Skip(name, "no such image") for name in file.unused]
            log.warning("%d captions belong to no image in '%s': %s.", len(lost), path, listed(lost))
        return StoredSamples(source, conditions, missing="has no caption")

    def _file(self, folder: Path, argument: str) -> Path:
        given = self.captions[argument]
        candidates = [folder / name for name in _CAPTION_FILES] if given is None else [Path(given)]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            option = "captions" if argument == "root" else "held_out_captions"
            tried = ", ".join(f"'{path}'" for path in candidates)
            raise FileNotFoundError(
                f"Argument `{option}` expected a file of captions, but got {given}, and there is no {tried}. "
                "Give its path."
            )
        return found
