"""The files of a run: its newest checkpoint, and what lies beside it."""

import logging
from pathlib import Path

log = logging.getLogger("lightning.pytorch")  # whose messages a user sees

LAST = "last.ckpt"
CONFIG = "config.yaml"


def checkpoint_of(path: Path, *, argument: str = "ckpt") -> Path:
    """Return the newest checkpoint of a run, and log which; a path that is no folder is returned as it is.

    Of a folder with versions the newest that has a checkpoint counts, by its number; of several checkpoints
    ``last.ckpt``, else the one that was written last.

    Args:
        path: A checkpoint, the folder of a run or of one of its versions.
        argument: The name under which the user gave it.

    Raises:
        FileNotFoundError: If a folder holds no checkpoint.

    Example:
        >>> checkpoint_of(Path("runs/model.ckpt")).as_posix()
        'runs/model.ckpt'
    """
    if not path.is_dir():
        return path
    newest = find_checkpoint(path)
    if newest is None:
        raise FileNotFoundError(
            f"Argument `{argument}` expected a checkpoint or the folder of a run, but got '{path}', which holds no "
            "checkpoint. It is written during `lightning-iet fit`."
        )
    log.info("Checkpoint: %s", newest)
    return newest


def find_checkpoint(folder: Path) -> Path | None:
    """Return what :func:`checkpoint_of` does of a folder, without a word; ``None`` if it holds no checkpoint."""
    versions = sorted(folder.glob("version_*"), key=version_number, reverse=True)
    for place in (folder, folder / "checkpoints", *(version / "checkpoints" for version in versions)):
        files = sorted(place.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
        if files:
            return place / LAST if place / LAST in files else files[-1]
    return None


def beside(checkpoint: Path, name: str) -> Path | None:
    """Return a file of the run that a checkpoint is of, or ``None``: it lies in its folder or in the one above.

    Args:
        checkpoint: its path.
        name: the name of the file, such as ``config.yaml``.

    Example:
        >>> beside(Path("no/such.ckpt"), "config.yaml") is None
        True
    """
    places = (folder / name for folder in checkpoint.absolute().parents[:2])
    return next((place for place in places if place.is_file()), None)


def version_number(folder: Path) -> int:
    """Return the number of a version's folder, -1 of one that has none (run ids of Weights & Biases).

    Example:
        >>> version_number(Path("runs/digits/version_3")), version_number(Path("runs/digits/x7k2"))
        (3, -1)
    """
    number = folder.name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1
