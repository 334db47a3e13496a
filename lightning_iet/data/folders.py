"""Folders of images, with labels or captions."""

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iet.data.captions import LIST_SUFFIXES, TEXTS, find_captions
from lightning_iet.data.formats import suffix_of
from lightning_iet.data.images import ImageDataModule
from lightning_iet.data.listing import check_one_split, is_system_entry, left_alone, masks_among, without_excluded
from lightning_iet.data.samples import Skip
from lightning_iet.data.sources import Data, FolderSource, PagedSource, Source, with_pages
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


def stored_pages(
    source: Source, conditions: Sequence[int | str | None] | None = None, *, missing: str = "no condition"
) -> StoredSamples:
    """Return all pages of the files of a source, each with the condition of its file; see :class:`StoredSamples`."""
    pages = with_pages(source)
    if conditions is not None and isinstance(pages, PagedSource):
        conditions = [conditions[file] for file, _ in pages.items]
    return StoredSamples(pages, conditions, missing=missing)


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
        if self.root is not None and self.held_out is not None and self.exists(self.held_out):
            inner, outer = sorted((self.held_out.resolve(), self.root.resolve()), key=lambda path: -len(path.parts))
            held_out, trained_on = ({*map(Path.resolve, self.files_at(path))} for path in (self.held_out, self.root))
            if inner.is_relative_to(outer) or held_out & trained_on:
                raise ValueError(
                    f"Argument `held_out` expected a place beside `root`, but got '{self.held_out}' and '{self.root}', "
                    "which share images: the model would be trained on images that are to be held out."
                )
        train = self._checked("root", self.root)
        return train if self.held_out is None else (train, self._checked("held_out", self.held_out))

    def _checked(self, argument: str, path: Path | None) -> Dataset[Any]:
        if path is None or not self.exists(path):
            found = "None" if path is None else f"{str(path)!r}, which does not exist"
            raise FileNotFoundError(
                f"Argument `{argument}` expected {self.expected}, but got {found}. Give the right path, or try with "
                "random images by `synthetic: true`."
            )
        return self.open(path, argument=argument)

    def exists(self, path: Path) -> bool:
        """Whether there is something at a path."""
        return path.exists()

    def files_at(self, path: Path) -> Iterable[Path]:
        """Return the files that a path stands for, where it may be a pattern."""
        return ()

    def open(self, path: Path, *, argument: str) -> Dataset[Any]:
        """Open the images at a path that exists: as the argument ``"root"`` first, then as ``"held_out"``."""
        raise NotImplementedError


def open_folder(
    path: Path, *, argument: str, exclude: Sequence[str] | str | None = None, used: Collection[str] = ()
) -> FolderSource:
    """Open the images of a folder to train on, and say what is left alone.

    Args:
        path: The folder.
        argument: The name under which the user gave it.
        exclude: Patterns of names that are left out; with ``None``, masks beside their pictures are refused.
        used: Suffixes of files that are read for something else.

    Raises:
        ValueError: If it is no folder, splits lie side by side in it, or masks among the images.
    """
    if not path.is_dir():
        raise ValueError(f"Argument `{argument}` expected a folder of images, but got '{path}', which is none.")
    patterns = [exclude] if isinstance(exclude, str) else exclude or []
    source = FolderSource(path, exclude=patterns, used=used)
    check_one_split(source.names, path, argument=argument)
    masked = None if exclude is not None else masks_among(source.names)
    if masked is not None:
        raise ValueError(
            f"Argument `exclude` expected to say what to leave out of '{path}', where '{printable(masked[1])}' looks "
            f"like the mask of '{printable(masked[0])}', but got None. Give patterns such as '*_mask.png' or "
            "'masks/*', or [] to train on all."
        )
    if source.left_alone:
        log.warning("Left alone in '%s': %s; %d images are read.", path, source.left_alone, len(source))
    return source


class ImageFolderDataModule(StoredDataModule):
    """Images in a folder; if they lie in sub-folders, the first level of these are the classes, in order of name.

    Every page of a file is an image, such as the slices of a TIFF stack. Other files are left alone, and counted in one
    line; so are bins and thumbnails that systems and network drives keep (``$RECYCLE.BIN``, ``@eaDir``). HEIC needs the
    extra ``heic``, DICOM and NIfTI ``medical``.

    AFHQ's dogs are ``root: afhq/train/dog`` with ``held_out: afhq/val/dog``.

    Args:
        root: The folder.
        held_out: A folder of held-out images with the same classes; ``None`` = hold out some of those in ``root``.
        exclude: Patterns of names to leave out, such as ``*_mask.png`` or ``masks/*``; ``None`` = none, and masks that
            lie beside their pictures are refused.
        **kwargs: See :class:`~lightning_iet.data.ImageDataModule`.

    Attributes:
        classes: Names of the classes; empty where images have none.

    Raises:
        FileNotFoundError: In ``setup``, if a folder does not exist.
        ValueError: If it holds no images, or some cannot be used, or some lie beside the classes, a class has none, or
            folders of several splits (``train``, ``val``) lie side by side.

    Example:
        >>> dogs = ImageFolderDataModule(Path("afhq/train/dog"), image_size=64, flip=True, synthetic=True)
        >>> dogs.setup("fit")
        >>> dogs.train_set[0][0].shape
        torch.Size([3, 64, 64])
    """

    title: ClassVar[str] = "the folder"

    def __init__(
        self,
        root: Path | None = None,
        *,
        held_out: Path | None = None,
        exclude: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, held_out=held_out, **kwargs)
        self.exclude = exclude
        self.classes: list[str] = []

    def open(self, path: Path, *, argument: str) -> Dataset[Any]:
        """Open the images of a folder."""
        files = open_folder(path, argument=argument, exclude=self.exclude)
        source = with_pages(files)
        names = [source.name(index) for index in range(len(source))]
        folders = [_class(name) for name in names]
        if argument == "root":
            self.classes = sorted(set(folders) - {""})
            if self.classes:
                self._check_no_class_is_empty(path, files)
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

    def _check_no_class_is_empty(self, path: Path, files: FolderSource) -> None:
        """Refuse a folder without images: the classes after it would have other numbers than their order says."""
        there = (child.name for child in sorted(path.iterdir()) if child.is_dir())
        named = [name for name in there if not is_system_entry(name, is_folder=True)]
        patterns = [self.exclude] if isinstance(self.exclude, str) else self.exclude or []
        named = without_excluded([f"{name}/" for name in named], patterns)
        empty = [name[:-1] for name in named if _class(f"{name}image") not in self.classes]
        if empty:
            inside = Counter(suffix_of(name) for name in files.listing.files if _class(name) == _class(f"{empty[0]}/x"))
            found = f" (but {left_alone(inside)})" if inside else ""
            raise ValueError(
                f"Argument `root` expected images in each folder in '{path}', since folders are classes, but got none "
                f"in {', '.join(repr(printable(name)) for name in empty[:5])}{found}. Remove it, or leave it out by "
                f"`exclude: {empty[0]}/*`."
            )


def _class(name: str) -> str:
    """The outermost folder of a path, in Unicode's form NFC; empty for a file that lies in none."""
    folder, slash, _ = name.partition(os.sep)
    return unicodedata.normalize("NFC", folder) if slash else ""


class CaptionFolderDataModule(StoredDataModule):
    """Images with captions: ``metadata.jsonl`` or ``.csv``, text files beside images, or LAION-10k's JSON of captions.

    Images without a caption are named and counted like images that cannot be read; captions without an image too, but
    they stop nothing.

    Args:
        root: Folder of the images, and of those below.
        captions: The list of captions, see :func:`~lightning_iet.data.captions.read_captions`; ``None`` =
            ``metadata`` or ``captions``, as ``.jsonl``, ``.csv``, ``.parquet`` or ``.json``, in the folder or in those
            below, with names relative to their place; or else a file ``.txt`` or ``.caption`` beside each image.
        held_out: A folder of held-out images with captions; ``None`` = hold out some of those in ``root``.
        held_out_captions: The list of theirs.
        caption_key: Which entry or column of a list is the caption; ``None`` = ``text``, ``caption``, ``captions`` or
            ``prompt``, the first that there is.
        exclude: See :class:`ImageFolderDataModule`.
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
        caption_key: str | None = None,
        exclude: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, held_out=held_out, **kwargs)
        self.exclude = exclude
        self.captions = {"root": captions, "held_out": held_out_captions}
        self.caption_key = caption_key

    def open(self, path: Path, *, argument: str) -> Dataset[Any]:
        """Open the images of a folder, with their captions."""
        files = open_folder(path, argument=argument, exclude=self.exclude, used=(*TEXTS, *LIST_SUFFIXES))
        found = find_captions(
            path,
            files.names,
            files.listing.files,
            given=self.captions[argument],
            key=self.caption_key,
            option="captions" if argument == "root" else "held_out_captions",
        )
        return stored_pages(files, found, missing="has no caption")
