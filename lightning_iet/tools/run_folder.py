"""Where a run puts its files, and how they get there whole."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Trainer

__all__ = ["check_writable", "free_folder", "run_folder", "write_atomically"]


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run: the one in which `ModelCheckpoint` makes its ``checkpoints``.

    With a logger it is ``save_dir/name/version`` of the first one (``version_0`` for a numbered version, the project
    and the run id for Weights & Biases), without a logger the trainer's ``default_root_dir``. Loggers choose their
    version on the first process, so that only its answer counts in a run of several processes.

    Args:
        trainer: the trainer; the loggers of a started run know their version.

    Returns:
        The folder, which need not exist yet.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> run_folder(Trainer(logger=CSVLogger("runs", name="digits", version=3), accelerator="cpu")).as_posix()
        'runs/digits/version_3'
        >>> run_folder(Trainer(logger=False, default_root_dir="here", accelerator="cpu")).name
        'here'
    """
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)


def check_writable(folder: Path, *, argument: str, remedy: str, make: bool = True) -> None:
    """Makes ``folder`` and tries a file in it, so that a long job need not fail at its end.

    Args:
        folder: the folder; it and its parents are made where they are missing.
        make: False leaves no trace: the file is tried in the nearest parent that exists.
        argument: the name under which the user gave it.
        remedy: what to do about it, one sentence.

    Raises:
        ValueError: nothing can be written there.

    Example:
        >>> check_writable(Path(os.devnull) / "runs", argument="out", remedy="Give another folder with `--out`.")
        Traceback (most recent call last):
        ...
        ValueError: Argument `out` expected a folder that can be written, but got ... (Not a directory). Give ...
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder if make else _nearest(folder)):
            pass
    except OSError as error:
        raise ValueError(
            f"Argument `{argument}` expected a folder that can be written, but got '{folder}'"
            f" ({error.strerror}). {remedy}"
        ) from error


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest of its parents that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` that takes its name once the block has ended well.

    Whoever looks at ``path`` sees the old file or the new one, never a half-written one; when the block raises, the old
    file stays and the temporary one goes.

    Args:
        path: the file to write; its suffix is kept, for writers that choose the format by it.

    Yields:
        The temporary path to write to.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with write_atomically(Path(folder, "metrics.json")) as unfinished:
        ...         length = unfinished.write_text("{}")
        ...     [file.name for file in Path(folder).iterdir()]
        ['metrics.json']
    """
    # Named after the process, so that two runs that share a folder do not write into one another's file.
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def free_folder(folder: Path) -> Path:
    """``folder`` if it is new or empty, else the first of ``folder-1``, ``folder-2`` … that is: nothing is mixed.

    Args:
        folder: the folder that the user named.

    Returns:
        A folder that does not exist or holds nothing.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "image.png").write_text("")
        ...     free_folder(Path(folder)).name == Path(folder).name + "-1"
        True
    """
    number, candidate = 0, folder
    while candidate.is_dir() and any(candidate.iterdir()):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
