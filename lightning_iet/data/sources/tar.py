"""Images that are members of WebDataset shards."""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

__all__ = ["Member", "TarSource", "tar_members"]


class Member(NamedTuple):
    """A file in a shard."""

    path: Path
    name: str
    offset: int
    size: int
    is_link: bool = False

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            ValueError: if it is a link.
        """
        if self.is_link:
            raise ValueError("a link inside an archive, not a file")
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def tar_members(path: Path) -> Iterator[Member]:
    """The files in a shard, and links to files, in order.

    Args:
        path: the shard, uncompressed, for members are read in any order.

    Raises:
        tarfile.TarError: if it is no tar file.
        ValueError: if it is cut off.
    """
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isfile() or member.islnk() or member.issym():
                yield Member(path, member.name, member.offset_data, member.size, is_link=not member.isfile())
        _check_end(path, archive.offset)


class TarSource:
    """The images of WebDataset shards: of each member whose suffix is one of Pillow's.

    Args:
        paths: the shards, uncompressed.

    Attributes:
        members: the images.
        others: all else.

    Raises:
        ValueError: if a shard is cut off.
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
        """Name of the shard and of the member."""
        member = self.members[index]
        return f"{member.path.name}/{member.name}"

    def read(self, index: int) -> bytes:
        """Bytes of a member."""
        return self.members[index].read()


def _check_end(path: Path, end: int) -> None:
    """Refuse a shard without the block of zeros at its end: who knows how many images are missing behind it."""
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError("the archive is cut off")
