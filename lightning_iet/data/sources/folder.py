"""Images that are files in a folder."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["FolderSource"]


class FolderSource:
    """All files in a folder and below, sorted by name. Those whose names begin with a dot are left alone.

    Symbolic links are followed, each folder is visited once, so that links in a circle come to an end.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = sorted(_walk(os.fspath(path), set()), key=os.fsencode)
        self.names = [os.path.relpath(name, path) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Path below the folder."""
        return self.names[index]

    def read(self, index: int) -> bytes:
        """Bytes of a file; reading from a pipe would wait for ever, so that only files are opened."""
        path = os.path.join(self.path, self.names[index])
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            return file.read()


def _walk(folder: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        # Sorted, so that of two ways to one folder always the same is taken.
        for entry in sorted(entries, key=lambda entry: os.fsencode(entry.name)):
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                yield from _walk(entry.path, visited)
            else:
                yield entry.path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: listed as an image that cannot be read
        return False
