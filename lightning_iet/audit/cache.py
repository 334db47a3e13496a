"""Work in blocks, shared by processes: each block is done once and kept on disk."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lightning_iet.utilities.files import write_atomically
from lightning_iet.utilities.fingerprints import digest
from lightning_iet.utilities.progress import progress_bar

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun has started, unless that is done or there is only this one."""
    ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if ours:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if ours:
            dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """Return what each process has given, by rank, on every process.

    Example:
        >>> gather("alone")
        ['alone']
    """
    values: list[T | None] = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return cast(list[T], values)


@contextmanager
def all_or_none() -> Iterator[None]:
    """Wait at the end of a block for the other processes, and raise on every process what one of them has raised.

    Without it a process whose disk is full would leave the others waiting.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    first = next((e for e in gather(error) if e is not None), None)
    if error or first:
        raise error or cast(Exception, first)


Progress: TypeAlias = Callable[[int], None]


def part_of(progress: Progress, *, start: float, scale: float) -> Progress:
    """Show a part of some work as progress of the whole.

    Args:
        progress: takes how much of the whole is done.
        start: how much of the whole is done when the part begins.
        scale: how much of the whole a step of the part is.

    Returns:
        A function that takes how much of the part is done.

    Example:
        >>> part_of(print, start=100, scale=0.5)(10)
        105
    """
    return lambda done: progress(int(start + scale * done))


FORMAT = "2"  # to be raised when stored blocks change their meaning
_OURS = re.compile(r"\.?[0-9a-f]{64}(\.\d+)?\.safetensors")  # blocks, and those that were never finished
_SEAL = hashlib.sha256().digest_size


class BlockCache:
    """Tensors in a folder, each file under the hash of all that it was computed from.

    A file is written whole or not at all, with a hash of its content behind it. One that cannot be read, or whose bits
    have changed, counts as missing, so that it is computed again.

    Args:
        folder: made when the first block is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, key: str) -> bool:
        return self.load(key) is not None

    def load(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors stored under a key, or ``None``."""
        try:
            stored = self._path(key).read_bytes()
            if hashlib.sha256(memoryview(stored)[:-_SEAL]).digest() != stored[-_SEAL:]:
                return None
            return load(stored[:-_SEAL])
        except (FileNotFoundError, SafetensorError):
            return None

    def require(self, key: str) -> dict[str, Tensor]:
        """Return the tensors that some process has stored under a key.

        Raises:
            ValueError: if they are not there.
        """
        stored = self.load(key)
        if stored is None:
            raise ValueError(
                f"Argument `cache` expected a folder that all processes see and nobody empties, but got "
                f"'{self.folder}', where a block is missing. Give one on a shared disk with --cache."
            )
        return stored

    def store(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors under a key."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with write_atomically(self._path(key)) as unfinished:
            content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
            unfinished.write_bytes(content + hashlib.sha256(content).digest())

    def clear(self) -> None:
        """Remove the blocks, and the folder if nothing else is in it."""
        for file in self.folder.iterdir() if self.folder.is_dir() else ():
            if _OURS.fullmatch(file.name):
                file.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _path(self, key: str) -> Path:
        return self.folder / f"{digest(FORMAT, key)}.safetensors"


def in_blocks(
    description: str,
    keys: Sequence[str],
    compute: Callable[[slice, Progress], dict[str, Tensor]],
    *,
    cache: BlockCache,
    total: int,
    block: int,
    is_slow: bool = False,
) -> list[dict[str, Tensor]]:
    """Compute what the cache lacks, in turns with the other processes, and return all of it.

    Blocks are cut in the same places whatever the number of processes, so that their figures have the same bits.

    Args:
        description: what is being done, for the bar.
        keys: for each block the hash of all that its result depends on.
        compute: takes the block's place in the set, and a function to tell how many of its images are done.
        cache: where results go.
        total: number of images.
        block: images in a block.
        is_slow: whether a block may take minutes.

    Returns:
        The result of every block, on every process.

    Raises:
        ValueError: if the processes do not share the cache's folder.
    """
    with all_or_none(), progress_bar(description, total, hidden=rank() > 0, is_slow=is_slow) as bar:
        for number in range(rank(), len(keys), world_size()):
            place = slice(number * block, min((number + 1) * block, total))
            # Processes run side by side: what this one has done tells how far the others are.
            before = place.start - rank() * block
            if keys[number] not in cache:
                progress = part_of(bar.show, start=before, scale=world_size())
                cache.store(keys[number], compute(place, progress))
            bar.show(place.stop)
    return [cache.require(key) for key in keys]
