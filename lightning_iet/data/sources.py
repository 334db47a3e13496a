"""Stored images: arrays, folders, tar archives, Hugging Face data sets."""

import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_iet.data.decoding import Page, may_have_pages, page_numbers
from lightning_iet.utilities.errors import require

Data: TypeAlias = bytes | Page | NDArray[Any]
"""What a source holds of an image: a file's bytes, a page of a file, or an array."""


HEAD = 4096  # bytes that tell whether a file may have several pages


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


def load_array(path: Path) -> NDArray[Any]:
    """Map a .npy file into memory, or take the one array of images from a .npz file."""
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(stored, np.ndarray):
        return stored
    with stored:
        arrays = [stored[key] for key in stored.files]
    images = [array for array in arrays if array.ndim in (3, 4)]
    if len(images) != 1:
        raise ValueError(f"it holds {len(images)} arrays of 3 or 4 dimensions, not one")
    return images[0]


class FolderSource:
    """All files in a folder and below, sorted by name, except those whose names begin with a dot.

    Symbolic links are followed, each folder is visited once, so that links in a circle come to an end.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = sorted(_walk(os.fspath(path), set()), key=os.fsencode)
        self.names = [os.path.relpath(name, path) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the path below the folder."""
        return self.names[index]

    def read(self, index: int) -> bytes:
        """Return the bytes of a file; only of a regular file, since reading from a pipe could wait for ever."""
        path = os.path.join(self.path, self.names[index])
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            return file.read()

    def head(self, index: int) -> bytes:
        """Return the first bytes of a file."""
        path = os.path.join(self.path, self.names[index])
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            return file.read(HEAD)


def _walk(folder: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    """Paths of the files in a folder and below."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        # Sorted, so that of two ways to one folder always the same is taken.
        for entry in sorted(entries, key=lambda entry: os.fsencode(entry.name)):
            if entry.name.startswith("."):
                continue
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link that leads to itself: listed as an image that cannot be read
                is_folder = False
            if is_folder:
                yield from _walk(entry.path, visited)
            else:
                yield entry.path


def load_table(*paths: Path) -> Any:
    """Load one split as a ``datasets.Dataset``.

    Args:
        paths: A folder as ``save_to_disk`` writes it, or Parquet files.

    Returns:
        The split.

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
            raise ValueError(f"it has {len(columns)} columns of images, not one")
        self.column = column or columns[0]
        self.data = table.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        """Return the row of the data set."""
        return str(index)

    def read(self, index: int) -> bytes:
        """Return the bytes of an image, which lie in the row itself or in a file of its own."""
        image = self.data[index][self.column]
        if image is None:
            raise ValueError("a row without an image")
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


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


def tar_members(path: Path) -> Iterator[Member]:
    """Yield the files in a tar archive, and links to files, in order.

    Args:
        path: The archive, uncompressed, since members are read in any order.

    Raises:
        tarfile.TarError: If it is no tar file.
        ValueError: If it is cut off.
    """
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isfile() or member.islnk() or member.issym():
                yield Member(path, member.name, member.offset_data, member.size, is_link=not member.isfile())
        end = archive.offset
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # the block of zeros that ends an archive
            raise ValueError("the archive is cut off")


class TarSource:
    """The images of WebDataset archives: of each member whose suffix is one of Pillow's.

    The loader of ``datasets`` for this format copies all images into its cache, and refuses archives of which one of
    the first samples lacks a file. Here images are read where they lie.

    Args:
        paths: The archives, uncompressed.

    Attributes:
        members: The images.
        others: All other members.

    Raises:
        ValueError: If an archive is cut off.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        suffixes = set(Image.registered_extensions())
        self.members: list[Member] = []
        self.others: list[Member] = []
        for member in (member for path in paths for member in tar_members(path)):
            is_image = Path(member.name).suffix.lower() in suffixes
            (self.members if is_image else self.others).append(member)

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


class PagedSource:
    """The pages of the files of a source: every slice of a TIFF stack, every frame of an animation.

    Args:
        source: The files.

    Attributes:
        items: For every image the position of its file, and the number of its page where the file has several.

    Example:
        >>> PagedSource(ArraySource(np.zeros((2, 8, 8), dtype=np.uint8))).name(1)
        '1'
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.items: list[tuple[int, int | None]] = []
        for index in range(len(source)):
            numbers = self._pages(index)
            self.items += [(index, number if numbers != [0] else None) for number in numbers]

    def _pages(self, index: int) -> list[int]:
        """List the pages of a file; of most files a look at the first bytes tells that there is one."""
        if isinstance(self.source, ArraySource):
            return [0]
        try:
            start = self.source.head(index) if isinstance(self.source, FolderSource | TarSource) else None
            if start is not None and not may_have_pages(start):
                return [0]
            data = self.source.read(index)
        except Exception:  # what cannot be read is listed when it is its turn
            return [0]
        return page_numbers(data) if isinstance(data, bytes) else [0]

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
        """Return the file, or one page of it."""
        file, page = self.items[index]
        data = self.source.read(file)
        return Page(data, page) if page is not None and isinstance(data, bytes) else data


def open_source(path: Path, *, argument: str, pages: Literal["all", "first"] = "all") -> Source:
    """Find out what a path holds, and open it.

    Args:
        path: A folder of images (with folders in it), of WebDataset archives, or of a Hugging Face data set; or a file
            ``.npy``, ``.npz`` or ``.tar``.
        argument: The name under which the user gave the path.
        pages: Whether every page of a file is an image, or only the first.

    Returns:
        The source; it holds at least one item.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is something else, empty, damaged, or not readable.
    """
    wanted = f"Argument `{argument}` expected images"
    if not os.path.exists(path):  # which says no, too, to a link that leads to itself
        raise FileNotFoundError(f"{wanted}, but got '{path}', which does not exist. Check its name.")
    try:
        source = _open_any(path)
    except ModuleNotFoundError:
        raise
    except RecursionError as error:
        raise ValueError(f"{wanted}, but got '{path}', whose folders are nested too deeply.") from error
    except Exception as error:  # readers of archives and tables raise anything on damaged files
        raise ValueError(f"{wanted}, but got '{path}', which cannot be read ({_reason(error)}).") from error
    if not len(source):
        raise ValueError(f"{wanted}, but got '{path}', which holds none. Check the path.")
    return source if pages == "first" else with_pages(source)


def with_pages(source: Source) -> Source:
    """Return a source of all pages of its files; the source itself where no file has more than one."""
    paged = PagedSource(source)
    return source if len(paged) == len(source) else paged


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: '{error.filename}'" if error.filename else error.strerror
    return next(iter(str(error).splitlines()), "") or "it is damaged"


def _open_any(path: Path) -> Source:
    if not path.is_dir():
        if path.suffix in (".npy", ".npz"):
            return ArraySource(load_array(path))
        if path.suffix == ".tar":
            return TarSource([path])
        if path.suffix == ".parquet":
            return HuggingFaceSource(path)
        raise ValueError("it is no folder, .npy, .npz, .tar or .parquet")
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(child.name for child in path.iterdir() if child.is_dir()))
        raise ValueError(f"it holds several splits; give one of its folders: {splits}")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return HuggingFaceSource(path)
    source = FolderSource(path)
    files = [path / name for name in source.names]
    suffixes = {file.suffix for file in files}
    if suffixes == {".tar"}:
        return TarSource(files)
    return HuggingFaceSource(*files) if suffixes == {".parquet"} else source
