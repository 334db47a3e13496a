"""Where a run that was cut off goes on."""

import logging
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_iet.utilities.checkpoints import check_whole, outline

__all__ = ["last_checkpoint"]

log = logging.getLogger(__name__)


def last_checkpoint(trainer: Trainer) -> Path | None:
    """The newest whole checkpoint of a run, in any of its versions.

    Looked for where the trainer's callbacks will write: in ``save_dir/name/version_*/checkpoints`` of a logger that
    numbers its versions, in the one version of a logger that was given its own, in ``default_root_dir/checkpoints``
    without a logger, and in the ``dirpath`` of each checkpoint callback.

    *(our choice)* The newest is the one that was written last, by the time of the file. Progress would be wrong: who
    starts afresh under the same name after 1,000 steps wants to go on with the new run at its step 200. It decides only
    between files of one moment. Copy run folders with their times (``cp -a``, ``rsync -a``).

    A file that is torn, damaged or no checkpoint is named in a warning, and the one before it is used. So is one that
    was written while an error or Ctrl-C broke off a step, or after other processes with their shards had gone. Files of
    weights alone are passed over: there is no optimizer in them to go on with.

    Args:
        trainer: A trainer that has not started.

    Returns:
        The file, for ``trainer.fit(…, ckpt_path=…, weights_only=True)``; ``None`` if there is none to go on from, which
        one line says, so that the same program starts a run and goes on with it.

    Example:
        >>> trainer = Trainer(logger=False, default_root_dir="nowhere", accelerator="cpu")
        >>> last_checkpoint(trainer) is None
        True
    """
    folders = list(_folders(trainer))
    for folder in folders:
        if re.match(r"\w{2,}:/", str(folder)):  # s3://…, of which a Path keeps one slash
            raise ValueError(
                f"Argument `ckpt_path` expected a local run folder to look for the last checkpoint in, but got "
                f"'{folder}'. Give the address of the checkpoint itself."
            )
    files = {path for folder in folders for path in Path(folder).glob("*.ckpt")}
    for path, content in _whole_ones(files):
        if "optimizer_states" not in content:
            continue
        if fault := _fault(content, trainer):
            _warn(f"'{path}' {fault}.")
            continue
        rank_zero_info(f"Going on from '{path}', step {content['global_step']}.")
        return path
    rank_zero_info("There is no checkpoint to go on from yet: the run starts afresh.")
    return None


def _folders(trainer: Trainer) -> Iterator[str | Path]:
    """Where this trainer writes checkpoints, and where its earlier versions did."""
    for callback in trainer.checkpoint_callbacks:
        if folder := getattr(callback, "dirpath", None):
            yield folder
    if not trainer.loggers:
        yield Path(trainer.default_root_dir, "checkpoints")
        return
    logger = trainer.loggers[0]  # as ModelCheckpoint has it
    home = Path(logger.save_dir or trainer.default_root_dir, str(logger.name))
    if isinstance(logger.version, str):
        yield home / logger.version / "checkpoints"
    elif logger.version is not None:  # a service that has yet to choose an id has no earlier run of that id
        yield from home.glob("version_*/checkpoints")


def _whole_ones(files: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The readable files, newest first, with what they hold; others are named."""
    times = {path: written for path in files if (written := _written(path)) is not None}
    for _, at_once in groupby(sorted(times, key=times.__getitem__, reverse=True), key=times.__getitem__):
        found = []
        for path in sorted(at_once):
            try:
                check_whole(path, argument="ckpt_path")
                found.append((path, outline(path, argument="ckpt_path")))
            except (OSError, ValueError) as error:
                _warn(str(error))
        yield from sorted(found, key=lambda one: one[1].get("global_step", -1), reverse=True)


def _fault(content: dict[str, Any], trainer: Trainer) -> str | None:
    """Why a whole checkpoint is none to go on from."""
    try:
        batches = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        callbacks, _ = content["callbacks"], content["global_step"]
    except (KeyError, TypeError):
        return "is no checkpoint of a Lightning run"
    if batches["ready"] > batches["processed"]:
        return "was written in the middle of a step that an error broke off"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        shards = getattr(callback, "num_shards", 1)
        shards = trainer.world_size if shards is None else shards
        state = callbacks.get(callback.state_key, {})
        if isinstance(state, dict) and state.get("whole") is False:
            return "was written in the middle of an averaging that an error broke off"
        if shards > 1 and not state:
            return f"holds none of the {shards} shards: it is of another run, or was written when a process had gone"
    return None


@rank_zero_only
def _warn(message: str) -> None:
    log.warning("Passed over: %s", message)


def _written(path: Path) -> int | None:
    """When a file was written, in nanoseconds; ``None`` if it is gone meanwhile."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
