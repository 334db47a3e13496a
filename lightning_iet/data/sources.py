"""Stored images: arrays, folders, tar archives, Hugging Face data sets."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_iet.data.archives import TarSource, archives_at, shard_names
from lightning_iet.data.captions import LISTS
from lightning_iet.data.decoding import Page
from lightning_iet.data.formats import Pages, may_have_pages, pages_of, suffix_of
from lightning_iet.data.listing import (
    Listing,
    check_one_split,
    left_alone,
    list_folder,
    may_hold_images,
    read_regular,
    without_companions,
    without_excluded,
)
from lightning_iet.data.tables import HuggingFaceSource, one_split

Data: TypeAlias = bytes | Page | NDArray[Any]
"""What a source holds of an image: a file's bytes, a page of a file, or an array."""


class Source(Protocol):
    """Images that can be read one at a time, by several processes, in an order that does not change."""

    def __len__(self) -> int:
        """Return the number of images, readable or not."""

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""

    def read(self, index: int) -> Data:
        """Return one image as it is stored: the bytes of a file, or an array."""


class ArraySource:
    """The images of one array.

    Args:
        array: Shape ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)`` with 1, 3 or 4 channels. Where both of the
            latter fit, the channels are taken to be last.

    Raises:
        ValueError: If the shape is none of these.

    Example:
        >>> source = ArraySource(np.zeros((2, 3, 8, 8), dtype=np.uint8))
        >>> source.read(1).shape, source.name(1)
        ((8, 8, 3), '1')
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self.channels_first = array.ndim == 4 and array.shape[3] not in (1, 3, 4)
        if array.ndim not in (3, 4) or (self.channels_first and array.shape[1] not in (1, 3, 4)):
            raise ValueError(f"an array of shape {array.shape} holds no images (N, H, W), (N, H, W, C) or (N, C, H, W)")
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def name(self, index: int) -> str:
        """Return the position in the array."""
        return str(index)

    def read(self, index: int) -> NDArray[Any]:
        """Return one image, ``(H, W)`` or ``(H, W, C)``."""
        image = np.ascontiguousarray(self.array[index])
        return np.ascontiguousarray(image.transpose(1, 2, 0)) if self.channels_first else image


def load_array(path: Path, name: str | None = None) -> NDArray[Any]:
    """Map a .npy file into memory, or take one array of images from a .npz file.

    Args:
        path: The file.
        name: Of an array in a .npz file; ``None`` = the only one of 3 or 4 dimensions.

    Raises:
        ValueError: If there is no such array, or several, naming them.
    """
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    if not is_archive:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        if name is not None:
            raise ValueError(f"it is one array, which has no '{name}'")
        return array
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:  # of a damaged one it leaves a path open
        images = {key: stored[key] for key in stored.files if name in (None, key)}
        images = {key: array for key, array in images.items() if array.ndim in (3, 4)}
        if name is not None and not images:
            raise ValueError(f"of its arrays {', '.join(stored.files)} none of 3 or 4 dimensions is called '{name}'")
        if len(images) != 1:
            several = f": {', '.join(images)}; give one as {path.name}:{next(iter(images))}" if images else ""
            raise ValueError(f"it holds {len(images)} arrays of 3 or 4 dimensions, not one{several}")
    return next(iter(images.values()))


class FolderSource:
    """The images in a folder and below, sorted by name; see :class:`~lightning_iet.data.listing.Listing`.

    Args:
        path: The folder.
        listing: Its files, if they are listed already.
        exclude: Patterns of names that are left out.
        used: Suffixes of other files that are not left alone, but read for something else.

    Attributes:
        names: Paths of the images below the folder.
        left_alone: What other files there are, in words; empty where there are none.
        beside: Of these, by suffix, the number of files that may hold images, and do not belong to one.
        listing: All files.
    """

    def __init__(
        self,
        path: Path,
        *,
        listing: Listing | None = None,
        exclude: Sequence[str] = (),
        used: Collection[str] = (),
    ) -> None:
        self.path = path
        self.listing = list_folder(path) if listing is None else listing
        images, others = self.listing.images()
        self.names = without_excluded(images, exclude)
        others = Counter({suffix: number for suffix, number in others.items() if suffix not in used})
        self.left_alone = left_alone(others, self.listing.system, len(images) - len(self.names))
        unread = {name for name in self.listing.files if suffix_of(name) in others}.difference(images)
        self.beside = may_hold_images(without_companions(unread, images)) if may_hold_images(unread) else Counter()

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the path below the folder."""
        return self.names[index]

    def read(self, index: int) -> bytes:
        """Return the bytes of a file."""
        return read_regular(os.path.join(self.path, self.names[index]))

    def head(self, index: int) -> bytes:
        """Return the first bytes of a file."""
        return self.listing.head(self.names[index])


class PagedSource:
    """The pages of the files of a source: every slice of a TIFF stack, every frame of an animation.

    Args:
        source: The files.

    Attributes:
        items: For every image the position of its file, and the number of its page where the file has several.
        cut_off: Positions of the files whose pages could not be counted to the end.

    Example:
        >>> PagedSource(ArraySource(np.zeros((2, 8, 8), dtype=np.uint8))).name(1)
        '1'
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._last: tuple[int, Data] | None = None
        self.items: list[tuple[int, int | None]] = []
        self.cut_off: set[int] = set()
        for index in range(len(source)):
            numbers, is_whole = self._pages(index)
            self.items += [(index, number if numbers != [0] else None) for number in numbers]
            if not is_whole:
                self.cut_off.add(index)

    def _pages(self, index: int) -> Pages:
        """List the pages of a file; of most files a look at the first bytes tells that there is one."""
        if isinstance(self.source, ArraySource):
            return Pages([0])
        try:
            start = self.source.head(index) if isinstance(self.source, FolderSource | TarSource) else None
            if start is not None and not may_have_pages(start):
                return Pages([0])
            data = self.source.read(index)
        except Exception:  # what cannot be read is listed when it is its turn
            return Pages([0])
        return pages_of(data) if isinstance(data, bytes) else Pages([0])

    @property
    def names(self) -> list[str]:
        """Names of all images."""
        return [self.name(index) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        """Return the name of the file, with the number of the page where it has several."""
        file, page = self.items[index]
        return self.source.name(file) if page is None else f"{self.source.name(file)}, page {page + 1}"

    def read(self, index: int) -> Data:
        """Return the file, or one page of it; pages of one file that are read one after another share its bytes."""
        file, page = self.items[index]
        if page is None:
            return self.source.read(file)
        if self._last is None or self._last[0] != file:
            self._last = None  # before the next one is read: two large files may be too much
            self._last = file, self.source.read(file)
        data = self._last[1]
        return Page(data, page) if isinstance(data, bytes) else data


def open_source(path: Path, *, argument: str, pages: Literal["all", "first"] = "all") -> Source:
    """Find out what a path holds, and open it.

    Args:
        path: A folder of images (with folders in it), of WebDataset archives, or of a Hugging Face data set; a file
            ``.npy``, ``.npz``, ``.tar`` (also compressed) or ``.parquet``; or a pattern of names of such archives. What
            holds several things is followed by the name of one: ``FILE.npz:train_images``, ``FOLDER:test`` for a split
            of a data set, ``SHARDS:mask.png`` for one of several images in each sample.
        argument: The name under which the user gave the path.
        pages: Whether every page of a file is an image, or only the first.

    Returns:
        The source; it holds at least one item.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is something else, empty, damaged, or not readable, or holds several splits.
    """
    wanted = f"Argument `{argument}` expected images"
    place, name = split_name(path)
    if not os.path.exists(place) and not archives_at(place):  # it says no, too, to a link that leads to itself
        raise FileNotFoundError(f"{wanted}, but got '{path}', which does not exist. Check its name.")
    try:
        source = _open_any(place, name, argument)
    except ModuleNotFoundError:
        raise
    except _Refused as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError(f"{wanted}, but got '{path}', whose folders are nested too deeply.") from error
    except Exception as error:  # readers of archives and tables raise anything on damaged files
        raise ValueError(f"{wanted}, but got '{path}', which cannot be read ({_reason(error)}).") from error
    if not len(source):
        beside = left_alone_by(source)
        raise ValueError(
            f"{wanted}, but got '{path}', which holds none{f' (but {beside})' if beside else ''}. Check the path."
        )
    return source if pages == "first" else with_pages(source)


def left_alone_by(source: Source) -> str:
    """Return what lies beside the images of a source, in words; empty where nothing does."""
    return str(getattr(source.source if isinstance(source, PagedSource) else source, "left_alone", ""))


def beside(source: Source) -> dict[str, int]:
    """Count by suffix the files beside the images of a source that were not read, and may hold images."""
    return dict(getattr(source.source if isinstance(source, PagedSource) else source, "beside", {}))


def split_name(path: Path) -> tuple[Path, str | None]:
    """Take ``FILE.npz:name`` apart; a path that exists is one.

    Example:
        >>> split_name(Path("a.npz:train_images"))
        (PosixPath('a.npz'), 'train_images')
    """
    place, colon, name = os.fspath(path).rpartition(":")
    if os.path.exists(path) or not colon or not name or "/" in name or not (place and _is_there(place)):
        return path, None
    return Path(place), name


def _is_there(place: str) -> bool:
    return os.path.exists(place) or bool(archives_at(Path(place))) or suffix_of(place) == ".npz"


def with_pages(source: Source) -> Source:
    """Return a source of all pages of its files; the source itself where of each the first is the only one."""
    paged = PagedSource(source)
    return source if all(page is None for _, page in paged.items) else paged


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: '{error.filename}'" if error.filename else error.strerror
    return next(iter(str(error).splitlines()), "") or "it is damaged"


class _Refused(ValueError):
    """What is refused in whole sentences."""


def _open_any(path: Path, name: str | None, argument: str) -> Source:
    suffix = suffix_of(path.name)
    archives = archives_at(path)
    if archives:
        return TarSource(archives, image_key=name)
    if not path.is_dir():
        if suffix in (".npy", ".npz"):
            return ArraySource(load_array(path, name))
        if suffix == ".parquet":
            return HuggingFaceSource(path, column=name)
        raise ValueError("it is no folder, .npy, .npz, .tar or .parquet")
    if (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    ):
        return HuggingFaceSource(*one_split(path, name))
    listing = list_folder(path)
    source = FolderSource(path, listing=listing)
    shards = [file for file in listing.files if suffix_of(file).startswith(".tar")]
    parquet = [file for file in listing.files if suffix_of(file) == ".parquet" and Path(file).name not in LISTS]
    if source.names and (any(suffix_of(file) == ".tar" for file in shards) or parquet):
        more = f"{len(shards)} archives" if shards else f"{len(parquet)} Parquet files"
        raise ValueError(f"it holds {len(source.names)} images beside {more}: give the path of those that are meant")
    try:
        if not source.names and shards:
            check_one_split(shard_names(shards), path, argument=argument)
            return TarSource([path / file for file in shards], image_key=name)
        check_one_split(source.names, path, argument=argument)
    except ValueError as error:
        raise _Refused(str(error)) from error
    if not source.names and parquet:
        return HuggingFaceSource(*one_split(path, name))
    if name is not None:
        raise ValueError(f"it is a folder of images, which has no '{name}'")
    return source
