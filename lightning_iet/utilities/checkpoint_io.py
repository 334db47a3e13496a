"""Checkpoints that are there as a whole or not at all."""

import contextlib
import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer

__all__ = ["AtomicCheckpointIO", "use_atomic_checkpoints"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a hidden file beside its name, and gives it the name once it is on the disk.

    Whenever the process is killed or the machine loses power, the file of that name is the old one or the new one,
    whole. Nothing passes through a second copy in memory, and nothing is moved from one disk to another. What a killed
    process has left unfinished, the next one that saves into the folder clears away. Remote places (``s3://…``) are
    written in Lightning's way, and reading is Lightning's.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     AtomicCheckpointIO().save_checkpoint({"step": 3}, f"{folder}/last.ckpt")
        ...     [path.name for path in Path(folder).iterdir()], torch.load(f"{folder}/last.ckpt")
        (['last.ckpt'], {'step': 3})
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: What to save.
            path: Its file.
            storage_options: Not supported, as in Lightning's.

        Raises:
            OSError: If it cannot be written; a file of that name is then untouched.
            TypeError: If ``storage_options`` are given.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _clear_unfinished(place.parent)
            with _taking_the_name(place) as unfinished, unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            cause = _cause(error, place.parent)
            if cause is None:
                raise
            raise OSError(
                f"The checkpoint '{place}' could not be written ({cause}); a file that had this name is untouched. "
                "Make room or give another folder, then start the same command with `--ckpt_path last`."
            ) from error


def use_atomic_checkpoints(trainer: Trainer) -> None:
    """Let a trainer write its checkpoints with :class:`AtomicCheckpointIO`, unless the user has chosen another way.

    Args:
        trainer: Any trainer whose checkpoints are Lightning's ordinary files; others stay as they are.
    """
    kind = type(trainer.strategy.checkpoint_io)
    # Of either Lightning, but no subclass.
    if kind.__name__ == "TorchCheckpointIO" and kind.__module__.startswith(("lightning.", "lightning_fabric.")):
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


@contextlib.contextmanager
def _taking_the_name(path: Path) -> Iterator[Path]:
    """A hidden file that takes a name when the block has ended well, and is gone when it has not."""
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every file system knows how; the name is then on the disk a little later
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _clear_unfinished(folder: Path) -> None:
    """Remove what processes of this host that are no more have left unfinished."""
    ours = re.compile(rf"\..*\.{re.escape(socket.gethostname())}\.(\d+)\.unfinished")
    for path in folder.glob(".*.unfinished"):
        match = ours.fullmatch(path.name)
        if match and not _is_alive(int(match[1])):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's
        pass
    return True


def _cause(error: BaseException | None, folder: Path) -> str | None:
    """Why the operating system would not write, in its words; ``None`` if it was something else."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            free = f", {shutil.disk_usage(folder).free / 2**20:.0f} MiB free" if error.errno in _FULL else ""
            return f"{os.strerror(error.errno)}{free}"
        error = error.__context__  # torch's writer fails once more while it closes the file
    return None
