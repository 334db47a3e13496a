"""Checkpoints: written atomically, checked, and found again."""

import errno
import io
import logging
import os
import pickle
import re
import shutil
import socket
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_iet.utilities.errors import first_line
from lightning_iet.utilities.files import checkpoint_folders, write_atomically
from lightning_iet.utilities.plain_types import allow_imported_types, allow_plain_types, unreadable_entries

allow_plain_types()
log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SMALL = 2**20  # bytes of an array that may be copied in memory


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints under a hidden name, and rename them once they are on the disk.

    Whenever the process is killed or the machine loses power, the file is the old one or the new one, whole. There is
    no second copy in memory, and nothing is moved from one disk to another. Unfinished files of killed processes of
    this host are removed when the next checkpoint is saved into the folder. Remote addresses (``s3://…``) are written
    by Lightning.

    All but the plain tensors of the first checkpoint that a process writes is read back as a run that goes on from it
    would read it, without running code: a warning then names what cannot be read, not the next part of the run.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     AtomicCheckpointIO().save_checkpoint({"step": 3}, f"{folder}/last.ckpt")
        ...     [path.name for path in Path(folder).iterdir()], torch.load(f"{folder}/last.ckpt")
        (['last.ckpt'], {'step': 3})
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_checked = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint; ``storage_options`` are not supported, as in Lightning's.

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
            with (
                write_atomically(place, suffix=".unfinished", durable=True) as unfinished,
                unfinished.open("wb") as file,
            ):
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            cause = _cause(error, place.parent)
            if cause is None:
                raise
            raise OSError(
                f"The checkpoint '{place}' could not be written ({cause}); a file that had this name is untouched. "
                "Make room or give another folder, then start the same command with `--ckpt_path last`."
            ) from error
        if not self._is_checked:
            self._is_checked = True
            if not _is_read_without_code(checkpoint) and (fault := _unreadable(place)):
                rank_zero_warn(f"The checkpoint '{place}' was written, but no run can go on from it: {fault}")

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, location: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint.

        Args:
            path: Its file.
            map_location: As for ``torch.load``.
            weights_only: Whether nothing in the file may run code; ``None`` = so it is for a local file.

        Raises:
            ValueError: If such a file is cut off, or holds something that could run code.
        """
        if weights_only is not False and Path(path).is_file():
            if not zipfile.is_zipfile(path):
                raise ValueError(_not_whole(path, "which is cut off or no checkpoint", argument="ckpt_path"))
            allow_imported_types(Path(path))
            try:
                return super().load_checkpoint(path, map_location, weights_only=True)
            except OSError:
                raise
            except Exception:
                if not (fault := _unreadable(Path(path))):
                    raise
            raise ValueError(f"Argument `ckpt_path` expected a checkpoint of plain values, but got '{path}': {fault}")
        return super().load_checkpoint(path, map_location, weights_only)


def use_atomic_checkpoints(trainer: Trainer) -> None:
    """Let a trainer write checkpoints with :class:`AtomicCheckpointIO`, unless the user has chosen another plugin."""
    kind = type(trainer.strategy.checkpoint_io)
    # Of either Lightning, but no subclass.
    if kind.__name__ == "TorchCheckpointIO" and kind.__module__.startswith(("lightning.", "lightning_fabric.")):
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def _clear_unfinished(folder: Path) -> None:
    """Remove the unfinished files of processes of this host that have ended."""
    ours = re.compile(rf"\..*\.{re.escape(socket.gethostname())}\.(\d+)\.unfinished")
    for path in folder.glob(".*.unfinished"):
        match = ours.fullmatch(path.name)
        if match and not psutil.pid_exists(int(match[1])):
            path.unlink(missing_ok=True)


def _cause(error: BaseException | None, folder: Path) -> str | None:
    """Return the operating system's reason; ``None`` if the error has none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            free = f", {shutil.disk_usage(folder).free / 2**20:.0f} MiB free" if error.errno in _FULL else ""
            return f"{os.strerror(error.errno)}{free}"
        error = error.__context__  # torch's writer fails once more while it closes the file
    return None


def check_whole(path: Path, *, argument: str) -> None:
    """Refuse a file, given by an argument, that is missing, cut off, damaged, or not a checkpoint.

    torch writes checkpoints as zip archives: a truncated one has no table of contents, a damaged one fails a checksum.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, damaged or not a zip archive.

    Example:
        >>> check_whole(Path(__file__), argument="ckpt_path")
        Traceback (most recent call last):
        ...
        ValueError: Argument `ckpt_path` expected a whole checkpoint, but got '...', which is cut off or no ...
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"Argument `{argument}` expected a checkpoint file, but got '{path}', which does not exist."
        )
    fault = "which is cut off or no checkpoint"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return
        fault = f"of which '{damaged}' is damaged"
    except zipfile.BadZipFile:
        pass
    raise ValueError(_not_whole(path, fault, argument=argument))


def _not_whole(path: Any, fault: str, *, argument: str) -> str:
    remedy = "Use the one before it."
    if (before := _whole_before(Path(path))) is not None:
        remedy = f"Use the one before it: {before}."
    return f"Argument `{argument}` expected a whole checkpoint, but got '{path}', {fault}. {remedy}"


def _whole_before(path: Path) -> Path | None:
    """Return the checkpoint in the same folder that was written last before one that is not whole."""
    others = (file for file in path.parent.glob("*.ckpt") if file != path and zipfile.is_zipfile(file))
    return max(others, key=lambda file: file.stat().st_mtime_ns, default=None)


class UnreadableCheckpointError(ValueError):
    """Raised for a whole checkpoint that holds what is not read without running code."""


def _is_read_without_code(checkpoint: dict[str, Any]) -> bool:
    """Whether a run would read all of a checkpoint; False if that is to be seen from the file alone.

    Plain tensors, which are most of it, are always read: only the rest is written into memory and read back.
    """
    file = io.BytesIO()
    try:
        rest = _without_tensors(checkpoint, {})
        _NoTensors(io.BytesIO()).dump(rest)
        torch.save(rest, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # whatever it is, the file shows it too
        return False
    return True


class _NoTensors(pickle.Pickler):
    """Writes what holds no tensor and no large array: as large as a model, perhaps, they are not copied in memory."""

    def reducer_override(self, thing: Any) -> Any:
        is_large = isinstance(thing, np.ndarray) and thing.nbytes > _SMALL
        if is_large or isinstance(thing, torch.Tensor | torch.UntypedStorage | torch.TypedStorage):
            raise TypeError(f"{type(thing).__name__} is not written into memory")
        return NotImplemented


def _without_tensors(content: Any, seen: dict[int, Any]) -> Any:
    """Return what a container holds with ``None`` in the place of each plain tensor."""
    if type(content) in (torch.Tensor, torch.nn.Parameter) and not vars(content):
        return None
    if type(content) not in (dict, OrderedDict, list, tuple):
        return content
    if id(content) in seen:
        return seen[id(content)]
    if isinstance(content, dict):
        seen[id(content)] = rest = type(content)()
        rest.update((key, _without_tensors(value, seen)) for key, value in content.items())
        if isinstance(content, OrderedDict):
            vars(rest).update(vars(content))  # of a state dict its versions
        return rest
    if isinstance(content, list):
        entries: list[Any] = []
        seen[id(content)] = entries
        entries.extend(_without_tensors(value, seen) for value in content)
        return entries
    seen[id(content)] = kept = tuple(_without_tensors(value, seen) for value in content)
    return kept


def _unreadable(path: Path) -> str | None:
    """Say what in a checkpoint is not read without running code, and what to do; ``None`` = all of it is read."""
    try:
        _plain_content(path)
    except OSError:
        raise
    except Exception as error:
        return _what_is_not_read(path, error)
    return None


def _what_is_not_read(path: Path, error: Exception) -> str:
    """Say it of a checkpoint on which :func:`_plain_content` has failed."""
    entries = unreadable_entries(path)
    if not entries:  # values that cannot be made again, such as a member that an enumeration has lost
        return f"it holds something else than tensors and plain values ({_reason(error)})."
    (key, kind), more = entries[0], len(entries) - 1
    others = f" (and {more} more: {', '.join(name for name, _ in entries[1:4])})" if more else ""
    return (
        f"its `{key}` is a {kind}{others}, which is not read, for that could run code. In checkpoints to come keep "
        "a plain value in its place, or leave it out (save_hyperparameters(ignore=[…])). If you wrote this file "
        "yourself, add --trust-checkpoint."
    )


def _plain_content(path: Path) -> Any:
    """Read a checkpoint without running code, with tensors on the ``meta`` device."""
    try:
        return torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        allow_imported_types(path)
        return torch.load(path, map_location="meta", mmap=True, weights_only=True)


def _reason(error: Exception) -> str:
    """What is wrong of an error of torch's, whose text advises to run such a file's code all the same."""
    if not isinstance(error, pickle.UnpicklingError):
        return f"{type(error).__name__}: {first_line(error)}"
    lines = (line for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line)
    line = next(lines, first_line(error)).strip().removeprefix("WeightsUnpickler error: ")
    return line.partition(" was not an allowed global")[0].partition(" Please use ")[0]


def outline(path: Path, *, argument: str, trusted: bool = False) -> dict[str, Any]:
    """Check a checkpoint, and return its content with tensors on the ``meta`` device: no weights are loaded.

    No code in the file is run, unless it is trusted.

    Args:
        path: The file.
        argument: The argument by which the user gave it.
        trusted: Whether the file may run code: it is the user's own.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file fails :func:`check_whole`, or holds anything but tensors and plain values, such as code.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
        ...     torch.save({"global_step": 7, "state_dict": {"weight": torch.zeros(2, 3)}}, file.name)
        ...     found = outline(Path(file.name), argument="ckpt_path")
        >>> found["global_step"], found["state_dict"]["weight"].shape, found["state_dict"]["weight"].device
        (7, torch.Size([2, 3]), device(type='meta'))
    """
    check_whole(path, argument=argument)
    if trusted:
        content = torch.load(path, map_location="meta", mmap=True, weights_only=False)
    else:
        try:
            content = _plain_content(path)
        except OSError:
            raise
        except Exception as error:
            raise UnreadableCheckpointError(
                f"Argument `{argument}` expected a checkpoint of tensors and plain values, but got '{path}': "
                f"{_what_is_not_read(path, error)}"
            ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f"Argument `{argument}` expected a checkpoint of Lightning, but got '{path}', "
            f"which holds a {type(content).__name__}."
        )
    return content


def last_checkpoint(trainer: Trainer, *, trusted: bool = False) -> Path | None:
    """Return the newest whole checkpoint of a run, in any of its versions.

    The folders searched are those that the trainer's callbacks will write to: ``save_dir/name/version_*/checkpoints``
    of a logger that numbers its versions, the one version of a logger that was given its own,
    ``default_root_dir/checkpoints`` without a logger, and the ``dirpath`` of each checkpoint callback.

    *(our choice)* The newest file is the one with the latest modification time, not the one with the most steps: who
    starts afresh under the same name after 1,000 steps wants to go on with the new run at its step 200. Steps decide
    between files of the same time. Copy run folders with their times (``cp -a``, ``rsync -a``).

    A file that is truncated, damaged or not a checkpoint is named in a warning, and the one before it is used; likewise
    one that was written when an error or Ctrl-C had interrupted a step, or when other processes with their shards had
    ended. Files of weights alone are passed over: they hold no optimizer state. If no file is left, the run is not
    started afresh in their place.

    Args:
        trainer: A trainer that has not started.
        trusted: Whether files may run code: they are the user's own.

    Returns:
        The file, for ``trainer.fit(…, ckpt_path=…, weights_only=True)``; ``None`` if there is none, so that the same
        program starts a run and goes on with it. Which of both is logged.

    Raises:
        ValueError: If the run folder is a remote address; if the newest file holds what is not read without running
            code, or there are files and none can be used. Both name the file and what to do.

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
    faults: list[str] = []
    for path, content in _whole_ones(files, faults, trusted=trusted):
        if "optimizer_states" not in content:
            continue
        if fault := _fault(content, trainer):
            faults.append(f"'{path}' {fault}.")
            _warn(faults[-1])
            continue
        rank_zero_info(f"Going on from '{path}', step {content['global_step']}.")
        return path
    if faults:
        raise ValueError(
            f"Argument `ckpt_path` expected a checkpoint to go on from, but none of the {len(faults)} that the run has "
            f"can be used. The newest: {faults[0]} To start afresh all the same, remove them or give the run another "
            "name."
        )
    rank_zero_info("There is no checkpoint to go on from yet: the run starts afresh.")
    return None


def newest_checkpoint(trainer: Trainer) -> Path | None:
    """Return the checkpoint of a run, in any of its versions, that was written last, to be measured; ``None`` = none.

    Example:
        >>> trainer = Trainer(logger=False, default_root_dir="nowhere", accelerator="cpu")
        >>> newest_checkpoint(trainer) is None
        True
    """
    files = {path for folder in _folders(trainer) for path in Path(folder).glob("*.ckpt")}
    return max(files, key=lambda path: (path.stat().st_mtime_ns, path), default=None)


def _folders(trainer: Trainer) -> Iterator[str | Path]:
    """Yield the folders in which this trainer and its earlier versions write checkpoints."""
    for callback in trainer.checkpoint_callbacks:
        if folder := getattr(callback, "dirpath", None):
            yield folder
    if not trainer.loggers:
        yield Path(trainer.default_root_dir, "checkpoints")
        return
    logger = trainer.loggers[0]  # as ModelCheckpoint has it
    if logger.version is not None:  # a service that has yet to choose an id has no earlier run of that id
        home = Path(logger.save_dir or trainer.default_root_dir, str(logger.name))
        yield from checkpoint_folders(home, version=logger.version)


def _whole_ones(files: Iterable[Path], faults: list[str], *, trusted: bool) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the readable files, newest first, with their outlines; warn of the others and list what they lack."""
    times = {}
    for path in files:
        with suppress(FileNotFoundError):  # removed meanwhile
            times[path] = path.stat().st_mtime_ns
    for _, at_once in groupby(sorted(times, key=times.__getitem__, reverse=True), key=times.__getitem__):
        found = []
        for path in sorted(at_once):
            try:
                found.append((path, outline(path, argument="ckpt_path", trusted=trusted)))
            except UnreadableCheckpointError:
                # Neither damaged nor unfinished: the run's next checkpoint will not be read either. To go on from an
                # older one would repeat the same steps in every part of the run.
                raise
            except (OSError, ValueError) as error:
                text = str(error).partition("but got ")[2] or f"'{path}', which cannot be read: {error}."
                faults.append(text.partition(" Use the one before it")[0])
                _warn(str(error))
        yield from sorted(found, key=lambda one: one[1].get("global_step", -1), reverse=True)


def _fault(content: dict[str, Any], trainer: Trainer) -> str | None:
    """Say why a run cannot go on from a whole checkpoint; ``None`` = it can."""
    from lightning_iet.utilities.lightning import num_shards_of  # a model is read without Lightning's other name

    try:
        batches = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        callbacks, _ = content["callbacks"], content["global_step"]
    except (KeyError, TypeError):
        return "is no checkpoint of a Lightning run"
    if batches["ready"] > batches["processed"]:
        return "was written in the middle of a step that an error broke off"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        shards = num_shards_of(trainer, callback)
        state = callbacks.get(callback.state_key, {})
        if isinstance(state, dict) and state.get("whole") is False:
            return "was written in the middle of an averaging that an error broke off"
        if shards > 1 and not state:
            return f"holds none of the {shards} shards: it is of another run, or was written when a process had gone"
    return None


@rank_zero_only
def _warn(message: str) -> None:
    log.warning("Passed over: %s", message)


def next_epoch(checkpoint: dict[str, Any]) -> int:
    """The epoch whose batches a run reads first that goes on from a checkpoint.

    Lightning counts an epoch as done after its last step, also in a checkpoint that was written in that step, before
    the hooks of the epoch's end. Callbacks that do something there find out in this way that they have to catch up
    before data are read. After a checkpoint from ``on_train_batch_end`` these hooks are not called any more
    (:func:`skips_epoch_end`); after one from the validation that follows they are, with the epoch before this one.
    """
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] + ends_an_epoch(checkpoint)


def ends_an_epoch(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint was written in the last step of an epoch, before the hooks of its end."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    return took_last_batch(checkpoint) and progress["ready"] > progress["processed"]


def took_last_batch(checkpoint: dict[str, Any]) -> bool:
    """Whether the step before a checkpoint was the last one of its epoch."""
    return bool(checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"])


def skips_epoch_end(checkpoint: dict[str, Any]) -> bool:
    """Whether a run goes on behind an epoch whose sums are in the checkpoint, and that ends without its hooks.

    They are not called any more after a checkpoint from ``on_train_batch_end`` of the last step. Of an epoch that the
    run was stopped within they have been called, and the sums are kept, for :func:`reopen_epoch` may let it go on.
    """
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    if ends_an_epoch(checkpoint):
        return bool(batches["processed"] > batches["completed"])
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    return not took_last_batch(checkpoint) and bool(0 < epochs["ready"] == epochs["processed"])


def reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Change the loops in a checkpoint so that a run goes on in the middle of the epoch that it was stopped in.

    Lightning counts that epoch as done: the hooks of its end are called, and a run that goes on begins the next one.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts["processed"] = counts["completed"] = counts["started"] - 1


def warn_of_changes(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Warn of a run that goes on with other settings of a class than its checkpoint was written with."""
    changed = [f"{key} {value!r} to {new[key]!r}" for key, value in old.items() if value != new[key]]
    if changed:
        rank_zero_warn(f"{name} goes on with other settings than the checkpoint's: {', '.join(changed)}.")
