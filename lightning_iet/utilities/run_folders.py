"""The newest checkpoint of a run's folder."""

import logging
from pathlib import Path

log = logging.getLogger("lightning.pytorch")  # whose messages a user sees

LAST = "last.ckpt"


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
    versions = sorted(path.glob("version_*"), key=_number, reverse=True)
    for folder in (path, path / "checkpoints", *(version / "checkpoints" for version in versions)):
        files = sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
        if files:
            newest = folder / LAST if folder / LAST in files else files[-1]
            log.info("Checkpoint: %s", newest)
            return newest
    raise FileNotFoundError(
        f"Argument `{argument}` expected a checkpoint or the folder of a run, but got '{path}', which holds no "
        "checkpoint. It is written during `lightning-iet fit`."
    )


def _number(version: Path) -> int:
    number = version.name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1
