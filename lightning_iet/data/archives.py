"""WebDataset archives: tar files in which members of one name are one sample."""

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
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from lightning_iet.data.formats import HEAD, image_suffixes, is_image, suffix_of
from lightning_iet.data.listing import is_system, left_alone, may_hold_images

log = logging.getLogger(__name__)

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
    """Yield the files in a tar archive, and links to files, in order, without those of the system.

    Args:
        path: The archive; where it is compressed, a copy of it is unpacked.

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
