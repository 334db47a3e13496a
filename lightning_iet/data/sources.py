"""Stored images: arrays, folders, tar archives, Hugging Face data sets."""

import atexit
import bz2
import glob
import gzip
import logging
import lzma
import os
import re
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_iet.data.captions import LISTS
from lightning_iet.data.decoding import Page
from lightning_iet.data.formats import HEAD, Pages, image_suffixes, is_image, may_have_pages, pages_of, suffix_of
from lightning_iet.data.listing import (
    Listing,
    check_one_split,
    is_system,
    left_alone,
    list_folder,
    may_hold_images,
    read_regular,
    without_companions,
    without_excluded,
)
from lightning_iet.utilities.errors import require

log = logging.getLogger(__name__)

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
        head = getattr(self.source, "head", None)
        try:
            start = None if head is None else head(index)
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


# --- tar archives -----------------------------------------------------------------------------------------------------

_COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")


class SeveralImages(ValueError):
    """Samples hold several images, and none or no such one is chosen."""


class Member(NamedTuple):
    """A file in a tar archive."""

    path: Path
    name: str
    offset: int
    size: int
    is_link: bool = False

    def read(self, most: int | None = None) -> bytes:
        """Return its bytes, or the first of them.

        Raises:
            ValueError: If it is a link.
        """
        if self.is_link:
            raise ValueError("a link inside an archive, not a file")
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size if most is None else min(most, self.size))

    @property
    def key(self) -> tuple[Path, str]:
        """What the members of one sample have in common: the archive, and the name up to the first dot."""
        name = PurePath(self.name)
        return self.path, str(name.with_name(name.name.partition(".")[0]))

    @property
    def ending(self) -> str:
        """What tells the members of one sample apart: what follows the first dot, in small letters.

        Example:
            >>> Member(Path("a.tar"), "x/000.mask.PNG", 0, 0).ending
            'mask.png'
        """
        return PurePath(self.name).name.partition(".")[2].lower()


def archives_at(path: Path) -> list[Path]:
    """Return the tar archives that a path names: itself, or where it is a pattern such as ``train-*.tar``, all of it.

    Example:
        >>> archives_at(Path("shards-of-nobody/*.tar"))
        []
    """
    if path.is_file():
        return [path] if suffix_of(path.name) in _SUFFIXES else []
    if path.exists() or not glob.has_magic(os.fspath(path)):
        return []
    return sorted(Path(name) for name in glob.glob(os.fspath(path)) if suffix_of(name) in _SUFFIXES)


def archives_in(folder: Path) -> list[Path]:
    """Return the tar archives in a folder, without those of the system."""
    found = (path for path in folder.iterdir() if path.is_file() and not is_system(path.name))
    return sorted(path for path in found if suffix_of(path.name) in _SUFFIXES)


def shard_names(names: Sequence[str]) -> list[str]:
    """Return patterns as folders, in which :func:`~lightning_iet.data.listing.check_one_split` sees splits of shards.

    Example:
        >>> shard_names(["train-000.tar", "val-000.tar"])
        ['train-*.tar/0', 'val-*.tar/0']
    """
    return [re.sub(r"\d+", "*", name) + "/0" for name in names]


def _seekable(path: Path) -> Path:
    """The archive itself, or a copy without compression that is removed at the end: members are read in any order."""
    stored = path.stat()
    return _unpacked(path, stored.st_ino, stored.st_size, stored.st_mtime_ns)


@cache
def _unpacked(path: Path, *_stored: int) -> Path:
    """Unpack an archive once, unless another file has come to its place since."""
    with path.open("rb") as file:
        start = file.read(8)
    opens = next((opens for magic, opens in _COMPRESSED.items() if start.startswith(magic)), None)
    if opens is None:
        return path
    folder = tempfile.mkdtemp(prefix="lightning-iet-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = Path(folder, path.name)
    try:
        with opens(path, "rb") as packed, copy.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (EOFError, lzma.LZMAError, OSError) as error:
        raise ValueError(f"'{path.name}' could not be unpacked into '{folder}': {error}") from error
    log.warning("Unpacked '%s' for the time of this run: %d MB in '%s'.", path, copy.stat().st_size >> 20, folder)
    return copy


def tar_members(path: Path) -> Iterator[Member]:
    """Yield the files in a tar archive, unpacked where compressed, and links to files, in order, without the system's.

    Raises:
        tarfile.TarError: If it is no tar file.
        ValueError: If it is cut off.
    """
    path = _seekable(path)
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if not is_system(member.name) and (member.isfile() or member.islnk() or member.issym()):
                yield Member(path, member.name, member.offset_data, member.size, is_link=not member.isfile())
        end = archive.offset
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # the block of zeros that ends an archive
            raise ValueError("the archive is cut off")


def _is_image(member: Member) -> bool:
    """Whether a member is an image, by its suffix, or where it has none by its first bytes."""
    suffix = suffix_of(member.name)
    if suffix or member.is_link:
        return suffix in image_suffixes()
    return is_image(member.read(HEAD), named=False)


class TarSource:
    """The images of WebDataset archives: of each member whose suffix is one of an image, one for each sample.

    The loader of ``datasets`` for this format copies all images into its cache, and refuses archives of which one of
    the first samples lacks a file. Here images are read where they lie.

    Args:
        paths: The archives.
        image_key: Which of several images of a sample is meant, by what follows the first dot of its name:
            ``"jpg"``, ``"mask.png"``; several for archives of several kinds are separated by ``;``. ``None`` = there is
            one.
        used: Suffixes of other members that are not left alone, but read for something else.

    Attributes:
        members: The images: of each member without a suffix its first bytes tell.
        others: All other members.
        left_alone: Numbers of other members and of images of other keys, in words.
        beside: Of other members, by suffix, the number of those that may hold images, and belong to no image's sample.

    Raises:
        SeveralImages: If samples hold several images and none is chosen.
        ValueError: If an archive is cut off, or samples hold several images of one key.
    """

    def __init__(self, paths: Sequence[Path], *, image_key: str | None = None, used: Collection[str] = ()) -> None:
        self.members: list[Member] = []
        self.others: list[Member] = []
        for member in (member for path in paths for member in tar_members(path)):
            (self.members if _is_image(member) else self.others).append(member)
        found = Counter(suffix_of(member.name) for member in self.others)
        unchosen = Counter[str]() if image_key is None else self._choose(image_key)
        self.left_alone = left_alone(unchosen + Counter({name: n for name, n in found.items() if name not in used}))
        samples = {member.key for member in self.members}
        self.beside = may_hold_images(member.name for member in self.others if member.key not in samples)
        self._check_one_each()

    def _choose(self, image_key: str) -> Counter[str]:
        """Keep the images of a key, and count the others."""
        keys = {key.strip().lstrip(".").lower() for key in image_key.split(";")}
        there = Counter(member.ending for member in self.members)
        if not keys & set(there):
            raise SeveralImages(f"no image's name ends in .{', .'.join(sorted(keys))}, but in {_endings(there)}")
        self.members = [member for member in self.members if member.ending in keys]
        return Counter({f".{key}": number for key, number in there.items() if key not in keys})

    def _check_one_each(self) -> None:
        samples: dict[tuple[Path, str], Member] = {}
        for member in self.members:
            other = samples.setdefault(member.key, member)
            if other is member:
                continue
            names = f"'{other.name}' and '{member.name}' of '{member.path.name}'"
            if other.ending == member.ending:
                raise ValueError(f"{names} are two images of one sample and one name; remove one")
            there = Counter(member.ending for member in self.members)
            raise SeveralImages(
                f"{names} are two images of one sample, which share what stands before the first dot; choose one by "
                f"`image_key` (in an audit: '{member.path.name}:{other.ending}') out of {_endings(there)}"
            )

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        """Return the names of the archive and the member."""
        member = self.members[index]
        return f"{member.path.name}/{member.name}"

    def read(self, index: int) -> bytes:
        """Return the bytes of a member."""
        return self.members[index].read()

    def head(self, index: int) -> bytes:
        """Return the first bytes of a member."""
        return self.members[index].read(HEAD)


def _endings(there: Counter[str]) -> str:
    shown = ", ".join(f"{key} ({number})" for key, number in there.most_common(6))
    return shown + (", …" if len(there) > 6 else "") if there else "nothing: there is no image"


# --- Hugging Face data sets -------------------------------------------------------------------------------------------

_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")


def splits_at(path: Path, configuration: str | None = None) -> dict[str, list[Path]]:
    """Return the splits at a path, each with what :func:`load_table` reads.

    Parquet files belong to the split that their name begins with, up to a hyphen, or that their folder is called;
    where none of them names a usual split, or all name the same, all are ``train``. Files of one split in several
    folders (``en/train-…``, ``de/train-…``), or with a word before the split (``en-train-…``), are different data sets,
    unless they count themselves as one (``…-00000-of-00002`` in one, ``…-00001-of-00002`` in the other).

    Args:
        path: A folder of ``save_to_disk``, a folder of Parquet files, or one such file.
        configuration: Which of several data sets: the name of its folder, or the word before the split.

    Raises:
        ValueError: If there are several, or none of that name, naming those that there are.
    """
    if (path / "dataset_dict.json").is_file():
        return {folder.name: [folder] for folder in sorted(path.iterdir()) if folder.is_dir()}
    if (path / "dataset_info.json").is_file() and not any(path.rglob("*.parquet")):
        return {"train": [path]}
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    files = [file for file in files if file == path or not is_system(file.relative_to(path).as_posix())]
    found: dict[str, dict[str, list[Path]]] = {}
    for file in files:
        name, split = _belongs_to(file, path)
        found.setdefault(name, {}).setdefault(split, []).append(file)
    chosen = _choose(found, configuration)
    if "train" in chosen or not chosen:
        return chosen
    if "training" in chosen:
        return {"train": chosen["training"]} | chosen
    usual = [split for split in chosen if split.lower() in _SPLITS]
    files = [file for part in chosen.values() for file in part]
    return chosen if usual and len(chosen) > 1 else {"train": files} | chosen


def _belongs_to(file: Path, path: Path) -> tuple[str, str]:
    """The configuration and the split of a Parquet file."""
    folder = PurePosixPath() if file == path else PurePosixPath(file.relative_to(path).parent.as_posix())
    first, *rest = file.stem.split("-")
    counted = re.fullmatch(r"([A-Za-z]+)[_.]?\d*", first)  # train, train_00
    if counted is not None and counted[1].lower() in _SPLITS:
        return str(folder), counted[1]
    at = next((number for number, word in enumerate(rest) if word.lower() in _SPLITS), None)
    if at is not None:
        return str(folder / "-".join([first, *rest[:at]])), rest[at]
    if file.stem.isdigit() or folder.name.lower() in _SPLITS:
        return str(folder.parent), file.parent.name
    return str(folder), first


def _choose(found: dict[str, dict[str, list[Path]]], configuration: str | None) -> dict[str, list[Path]]:
    """The splits of one configuration."""
    if configuration is not None:
        fitting = [name for name in found if configuration in (name, PurePosixPath(name).name)]
        if len(fitting) != 1:
            raise ValueError(f"there are {', '.join(sorted(found)) or 'none'}")
        return found[fitting[0]]
    merged: dict[str, list[Path]] = {}
    for splits in found.values():
        for split, files in splits.items():
            merged.setdefault(split, []).extend(files)
    if len(found) > 1 and not all(_is_one_set(files) for files in merged.values()):
        raise ValueError(f"there are several, {', '.join(sorted(found))}: give one of them")
    return merged


def _is_one_set(files: Sequence[Path]) -> bool:
    """Whether files count themselves as parts of one: each of 0 … N - 1 once."""
    matches = [re.search(r"-(\d+)-of-(\d+)$", file.stem) for file in files]
    numbers = [(int(match[1]), int(match[2])) for match in matches if match is not None]
    return len(numbers) == len(files) and sorted(numbers) == [(number, len(files)) for number in range(len(files))]


def one_split(path: Path, name: str | None) -> list[Path]:
    """Return what :func:`load_table` reads of one split.

    Args:
        path: See :func:`splits_at`.
        name: Of the split, or of the configuration; ``None`` = the only one.

    Raises:
        ValueError: If there are several, naming them.
    """
    try:
        splits = splits_at(path)
    except ValueError as error:
        if name is None:
            raise ValueError(f"of its data sets {error}, as '{path.name}:NAME' or by the path of its folder") from error
        splits, name = splits_at(path, name), None
    every = {file for files in splits.values() for file in files}
    whole = next((files for files in splits.values() if set(files) == every), None)
    if name is None and whole is not None:
        return whole
    if name not in splits:
        example = next(iter(splits), "train")
        raise ValueError(
            f"it holds several splits; give one of its folders: {', '.join(splits)}, or '{path.name}:{example}'"
        )
    return splits[name]


def load_table(*paths: Path) -> Any:
    """Load one split as a ``datasets.Dataset``.

    Args:
        paths: A folder as ``save_to_disk`` writes it, or Parquet files.

    Raises:
        ModuleNotFoundError: Without the package ``datasets``.
    """
    datasets = require("datasets", "audit")
    if paths[0].is_dir():
        return datasets.load_from_disk(str(paths[0]))
    return datasets.Dataset.from_parquet([str(path) for path in paths], keep_in_memory=True)


class HuggingFaceSource:
    """One column of images of a split.

    Args:
        paths: As :func:`load_table`.
        table: A split that is loaded already, instead of paths.
        column: Its name; ``None`` = the only column of images.

    Raises:
        ModuleNotFoundError: Without the package ``datasets``.
        ValueError: If there is no such column, or not one column of images.
    """

    def __init__(self, *paths: Path, table: Any = None, column: str | None = None) -> None:
        datasets = require("datasets", "audit")
        table = load_table(*paths) if table is None else table
        columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
        if column is not None and column not in columns:
            raise ValueError(f"its columns of images are {columns}, and '{column}' is none of them")
        if column is None and len(columns) != 1:
            which = f" ({', '.join(columns)})" if columns else ""
            raise ValueError(f"it has {len(columns)} columns of images{which}, not one")
        self.column = column or columns[0]
        self.data = table.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        """Return the row of the data set."""
        return str(index)

    def read(self, index: int) -> bytes:
        """Return the bytes of an image, which lie in the row itself or in a file of its own."""
        image = self._row(index)
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

    def head(self, index: int) -> bytes:
        """Return the first bytes of an image; where they lie in the row itself, all of it has been read."""
        image = self._row(index)
        return image["bytes"][:HEAD] if image["bytes"] is not None else read_regular(image["path"], HEAD)

    def _row(self, index: int) -> dict[str, Any]:
        image: dict[str, Any] | None = self.data[index][self.column]
        if image is None:
            raise ValueError("a row without an image")
        return image


# --- what a path holds ------------------------------------------------------------------------------------------------


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


def unread_beside(source: Source) -> dict[str, int]:
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
