"""A report's folder: it is there whole, or not at all."""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "FILES",
    "METRICS",
    "PAIRS",
    "PAIRS_PICTURE",
    "RATIOS_PICTURE",
    "REPORT",
    "check_apart",
    "check_free",
    "remedies",
    "whole_folder",
]

METRICS, PAIRS, REPORT = "metrics.json", "pairs.csv", "report.html"
PAIRS_PICTURE, RATIOS_PICTURE = "pairs.png", "ratios.png"
FILES = (REPORT, PAIRS, METRICS, PAIRS_PICTURE, RATIOS_PICTURE)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse a report's folder that holds something else, or a report that is not to be replaced.

    Args:
        folder: the folder that the user named.
        overwrite: replace a report.

    Raises:
        ValueError: naming the remedy.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"Argument `out` expected a new folder, but got '{folder}', which is something else.")
    files = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    others = files.difference(FILES)
    if others:
        raise ValueError(
            f"Argument `out` expected a new folder, but got '{folder}', which holds other files, among them "
            f"'{min(others)}'. Give another one with --out."
        )
    if files and not overwrite:
        raise ValueError(
            f"Argument `out` expected a new folder, but got '{folder}', which holds a report. "
            "Give another one with --out, or replace it with --overwrite."
        )


def check_apart(written: Mapping[str, Path], read: Mapping[str, Path]) -> None:
    """Refuse folders that lie in one another.

    The next audit would take pictures of a report for images; images that stand in two sets would be copies of
    themselves; and a report that takes the place of an old folder would take a cache in it along.

    Args:
        written: folders by the names of their arguments, ``"out"`` first.
        read: folders or files likewise.

    Raises:
        ValueError: naming both.
    """
    for argument, folder in written.items():
        for name, source in read.items():
            _refuse_within(argument, folder, name, source, f"Give another one with --{argument}.")
    (out, folder), *others = written.items()
    for argument, other in others:
        _refuse_within(argument, other, out, folder, f"Give another one with --{argument}.")
    for argument, source in read.items():
        for name, other in read.items():
            if argument != name and not _same(source, other):  # sets that are the same are refused by their content
                remedy = "Give folders that share no images: the inner ones would be compared with themselves."
                _refuse_within(argument, source, name, other, remedy)


def _refuse_within(argument: str, inner: Path, name: str, outer: Path, remedy: str) -> None:
    if Path(os.path.realpath(inner)).is_relative_to(os.path.realpath(outer)):
        raise ValueError(
            f"Argument `{argument}` expected a folder outside of `{name}`, but got '{inner}' in '{outer}'. {remedy}"
        )


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


@contextmanager
def remedies(kept: Path) -> Iterator[None]:
    """Say, where a long job is cut off, how to go on.

    Args:
        kept: where finished work lies.

    Raises:
        OSError: for a full disk, naming the remedy.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"Interrupted. The same command goes on from here; finished work is in {kept}.", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"The disk is full ({error.strerror}): no report was written. Make room and give the same command "
            f"again, which goes on from the finished work in {kept}; or choose other places with --out and --cache."
        ) from error


@contextmanager
def whole_folder(folder: Path, *, check: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """Give a new folder beside ``folder`` that takes its place once the block has ended well.

    When the block raises, an old folder stays as it was and the new one goes.

    Args:
        folder: the folder that is to appear.
        check: raises if it must not: asked once more at the end, for much may have changed in the meantime.

    Yields:
        The folder to write to.
    """
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        check()
        if folder.exists():
            folder.rename(old)
        unfinished.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        for rest in (unfinished, old):
            shutil.rmtree(rest, ignore_errors=True)
