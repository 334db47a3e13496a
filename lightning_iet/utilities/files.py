"""Files of runs and tools: names, folders, atomic writing, and the newest checkpoint of a run."""

import csv
import errno
import json
import logging
import math
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

log = logging.getLogger("lightning.pytorch")  # whose messages a user sees

LAST = "last.ckpt"
CONFIG = "config.yaml"


def printable(name: str) -> str:
    r"""Write a name so that it fits on one line and can be encoded as UTF-8.

    Bytes that are no UTF-8 (which Python keeps as surrogates), line breaks, and marks that turn the direction of
    writing around, are shown as escapes. Other characters stay as they are: quoting them is up to whoever writes HTML.

    Example:
        >>> printable("caf\udce9\n.png"), printable("été <b>.png")
        ('caf\\xe9\\n.png', 'été <b>.png')
    """
    return "".join(character if character.isprintable() else _escape(character) for character in name)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # os.fsdecode turns the byte 0xNN into the surrogate U+DCNN
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def run_folder(trainer: "Trainer") -> Path:
    """The folder of this run: the one in which `ModelCheckpoint` makes its ``checkpoints``.

    With a logger it is ``save_dir/name/version`` of the first one (``version_0`` for a numbered version, the project
    and the run id for Weights & Biases), without a logger the trainer's ``default_root_dir``. Loggers choose their
    version on the first process, so that only its answer counts in a run of several. The folder need not exist yet.

    Example:
        >>> from lightning.pytorch import Trainer
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
        tried = folder if make else next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=tried):
            pass
    except OSError as error:
        raise ValueError(
            f"Argument `{argument}` expected a folder that can be written, but got '{folder}'"
            f" ({error.strerror}). {remedy}"
        ) from error


@contextmanager
def write_atomically(path: Path, *, suffix: str | None = None, durable: bool = False) -> Iterator[Path]:
    """Write a file under a hidden name beside ``path``, and rename it to ``path`` once the block has ended well.

    A reader of ``path`` finds the old file or the new one, never a half-written one; when the block raises, the old
    file stays and the hidden one is removed.

    Args:
        path: The file to write.
        suffix: Ending of the hidden file's name; ``None`` = that of ``path``, for writers that choose the format by it.
        durable: Also flush to the disk, before the file gets its name and after, so that a power failure leaves the
            old file or the new one too.

    Raises:
        OSError: If the file cannot be written or renamed.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with write_atomically(Path(folder, "metrics.json")) as unfinished:
        ...         length = unfinished.write_text("{}")
        ...     [file.name for file in Path(folder).iterdir()]
        ['metrics.json']
    """
    # Named after host and process, so that two runs that share a folder do not write into one another's file.
    ending = path.suffix if suffix is None else suffix
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{ending}")
    try:
        yield unfinished
        if durable:
            with unfinished.open("r+b") as file:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    if durable:
        with suppress(OSError):  # not every file system can flush a folder; the name reaches the disk a little later
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def write_json(path: Path, content: Any) -> None:
    """Write dictionaries, lists, tuples, numbers and strings as JSON, atomically; what is not finite becomes ``null``.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder, "metrics.json"), {"run": {"skip_rate": float("nan")}})
        ...     json.loads(Path(folder, "metrics.json").read_text())
        {'run': {'skip_rate': None}}
    """
    with write_atomically(path) as unfinished:
        unfinished.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, values by the names of columns, as a table, atomically; a column that a row lacks is empty."""
    with write_atomically(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def free_folder(folder: Path) -> Path:
    """``folder`` if it is new or empty, else the first of ``folder-1``, ``folder-2`` … that is: nothing is mixed.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "image.png").write_text("")
        ...     free_folder(Path(folder)).name == Path(folder).name + "-1"
        True
    """
    number, candidate, named = 0, folder, named_folder(folder)
    while candidate.is_dir() and any(candidate.iterdir()):
        number += 1
        candidate = named.with_name(f"{named.name}-{number}")
    return candidate


def named_folder(folder: Path) -> Path:
    """Return the path of a folder that ends in its name: ``.`` and ``..`` are written out.

    Example:
        >>> named_folder(Path(".")) == Path.cwd(), named_folder(Path("runs/digits")).as_posix()
        (True, 'runs/digits')
    """
    return folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))


METRICS, PAIRS, REPORT = "metrics.json", "pairs.csv", "report.html"
PAIRS_PICTURE, RATIOS_PICTURE = "pairs.png", "ratios.png"
FILES = (REPORT, PAIRS, METRICS, PAIRS_PICTURE, RATIOS_PICTURE)


def check_free(folder: Path, *, own: Collection[str] = FILES, kind: str = "a report", overwrite: bool) -> None:
    """Refuse a folder that holds something else than this command writes, or that, unless it is to be replaced.

    Args:
        folder: the folder that a command is to write.
        own: names of what that command writes there; all else would be deleted with it.
        kind: what these files are.
        overwrite: whether they may be replaced.

    Raises:
        ValueError: naming the remedy.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"Argument `out` expected a new folder, but got '{folder}', which is something else.")
    files = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    others = files.difference(own)
    if others:
        raise ValueError(
            f"Argument `out` expected a new folder, but got '{folder}', which holds other files, among them "
            f"'{min(others)}'. Give another one with --out."
        )
    if files and not overwrite:
        raise ValueError(
            f"Argument `out` expected a new folder, but got '{folder}', which holds {kind}. "
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
            same = os.path.realpath(source) == os.path.realpath(other)
            if argument != name and not same:  # sets that are the same are refused by their content
                remedy = "Give folders that share no images: the inner ones would be compared with themselves."
                _refuse_within(argument, source, name, other, remedy)


def _refuse_within(argument: str, inner: Path, name: str, outer: Path, remedy: str) -> None:
    if Path(os.path.realpath(inner)).is_relative_to(os.path.realpath(outer)):
        raise ValueError(
            f"Argument `{argument}` expected a folder outside of `{name}`, but got '{inner}' in '{outer}'. {remedy}"
        )


@contextmanager
def remedies(kept: Path) -> Iterator[None]:
    """Say, when a long job is interrupted, how to go on from what is kept, once there is any.

    Raises:
        OSError: for a full disk, naming the remedy.
    """
    try:
        yield
    except KeyboardInterrupt:
        if _holds_files(kept):
            said = f"The same command goes on from here; finished work is in {kept}."
        else:
            said = "No part was finished, and nothing is kept: the same command starts anew."
        print(f"Interrupted. {said}", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        goes_on = f", which goes on from the finished work in {kept}" if _holds_files(kept) else ""
        raise OSError(
            f"The disk is full ({error.strerror}): no report was written. Make room and give the same command "
            f"again{goes_on}; or choose other places with --out and --cache."
        ) from error


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


@contextmanager
def whole_folder(folder: Path, *, check: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """Give a new folder to write to, beside ``folder``, which takes its place once the block has ended well.

    When the block raises, an old folder stays as it was and the new one goes.

    Args:
        folder: the folder that is to appear.
        check: raises if it must not: asked once more at the end, for much may have changed in the meantime.
    """
    folder = named_folder(folder)
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
            f"Argument `{argument}` expected a checkpoint or the folder of a run, but got '{path}', {_instead(path)}"
        )
    log.info("Checkpoint: %s", newest)
    return newest


def _instead(folder: Path) -> str:
    """Say what a folder without a checkpoint holds, and what to do."""
    if any((folder / name).is_file() for name in ("model_index.json", "scheduler_config.json")):
        return (
            "which holds a pipeline of diffusers and no checkpoint. Load it with diffusers, or audit it with "
            f"`lightning-iet audit-model --pipeline {folder}`."
        )
    below = _runs(folder)
    if not below:
        return "which holds no checkpoint. It is written during `lightning-iet fit`."
    more = f" and {len(below) - 3} more" if len(below) > 3 else ""
    return f"which holds no checkpoint itself, but the runs {', '.join(map(str, below[:3]))}{more}. Give one of them."


def _runs(folder: Path, *, depth: int = 2) -> list[Path]:
    """Return the folders of runs that lie in a folder, or in one of its folders."""
    found = list[Path]()
    for place in sorted(folder.iterdir()):
        if place.is_dir() and os.access(place, os.R_OK | os.X_OK):
            is_run = find_checkpoint(place) is not None
            found += [place] if is_run else _runs(place, depth=depth - 1) if depth > 1 else []
    return found


def find_checkpoint(folder: Path) -> Path | None:
    """Return what :func:`checkpoint_of` does of a folder, without a word; ``None`` if it holds no checkpoint."""
    versions = sorted(folder.glob("version_*"), key=version_number, reverse=True)
    for place in (folder, folder / "checkpoints", *(version / "checkpoints" for version in versions)):
        files = sorted(place.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
        if files:  # Lightning writes last-v1.ckpt where an earlier run has left last.ckpt
            return next((file for file in reversed(files) if re.fullmatch(r"last(-v\d+)?\.ckpt", file.name)), files[-1])
    return None


def file_beside(checkpoint: Path, name: str) -> Path | None:
    """Return a file of the run that a checkpoint is of, or ``None``: it lies in its folder or in the one above.

    Example:
        >>> file_beside(Path("no/such.ckpt"), "config.yaml") is None
        True
    """
    places = (folder / name for folder in checkpoint.absolute().parents[:2])
    return next((place for place in places if place.is_file()), None)


def checkpoint_folders(home: Path, *, version: int | str | None) -> list[Path]:
    """Return the folders in which a run and its earlier versions have checkpoints.

    Args:
        home: ``save_dir/name`` of a logger.
        version: A logger that was given a name has that version alone; one that numbers its versions has all.
    """
    return [home / version / "checkpoints"] if isinstance(version, str) else list(home.glob("version_*/checkpoints"))


def version_number(folder: Path) -> int:
    """Return the number of a version's folder, -1 of one that has none (run ids of Weights & Biases).

    Example:
        >>> version_number(Path("runs/digits/version_3")), version_number(Path("runs/digits/x7k2"))
        (3, -1)
    """
    number = folder.name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1
