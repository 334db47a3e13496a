"""Reads images on all cores; what cannot be read is counted and listed, never left out in silence."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import __version__ as pillow_version
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_iet.audit.cache import BlockCache, all_or_none, gather, rank, world_size
from lightning_iet.data.decoding import Fit, Pixels, Size, decode
from lightning_iet.data.samples import Skip, reason_of
from lightning_iet.data.sources import Source
from lightning_iet.utilities.files import printable
from lightning_iet.utilities.fingerprints import digest
from lightning_iet.utilities.progress import progress_bar


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in memory.

    Attributes:
        pixels: uint8, shape ``(N, C, H, W)``, grey or RGB.
        names: one for each.
        location: where they come from, for people.
        sha256: hash of their content and their order.
        skipped: what could not be read, beside the ``N``.
    """

    pixels: Tensor
    names: Sequence[str]
    location: str
    sha256: str
    skipped: Sequence[Skip] = field(default=())

    def __len__(self) -> int:
        return len(self.pixels)


def image_set(pixels: Tensor, *, location: str) -> ImageSet:
    """Wrap images that are in memory already, such as those that a model has just drawn.

    Args:
        pixels: uint8, shape ``(N, C, H, W)``, grey or RGB.
        location: where they come from, for people.

    Returns:
        The set; its images are named by their position.

    Example:
        >>> import torch
        >>> image_set(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), location="zeros").names
        ['0', '1']
    """
    names = [str(index) for index in range(len(pixels))]
    sha256 = digest(*pixels.shape, *(image.numpy().tobytes() for image in pixels.cpu()))
    return ImageSet(pixels=pixels, names=names, location=location, sha256=sha256)


BLOCK = 256  # images that are read, stored and looked up together
FEW = 4  # blocks up to which starting processes takes longer than reading


def read_images(
    source: Source,
    cache: BlockCache,
    *,
    argument: str,
    location: str,
    size: Size | None = None,
    fit: Fit = "stretch",
    strict: bool = False,
    workers: int | None = None,
) -> ImageSet:
    """Read all images of a source, together with the other processes.

    Blocks of images that were decoded before are taken from the cache if the bytes are still the same.

    Args:
        source: where they come from.
        cache: where their pixels go.
        argument: the name under which the user gave the source.
        location: where it lies, for people.
        size: height and width to resize to; ``None`` wants images of one size.
        fit: as :func:`~lightning_iet.data.decoding.decode`.
        strict: refuse what cannot be read, instead of listing it.
        workers: processes that decode; 0 = this one alone, ``None`` = one for each core.

    Returns:
        The images, in the order of the source; grey if all of them are.

    Raises:
        ValueError: if no image can be read, their sizes differ without ``size``, or ``strict`` meets an unreadable one.
    """
    if size is not None:
        _check_memory(len(source), size)
    blocks: list[_Block] = []
    dataset = _Blocks(source, cache, size, fit)
    with all_or_none(), progress_bar(f"Reading {argument} images", len(source), hidden=rank() > 0) as bar:
        for block in _loader(dataset, workers):
            if isinstance(block, OSError):
                raise block
            _check_sizes([*blocks[:1], block], source, argument)
            blocks.append(block)
            bar.show(min(block.first + len(block.hashes), len(source)))
    blocks = sorted((block for part in gather(blocks) for block in part), key=lambda block: block.first)
    _check_sizes(blocks, source, argument)
    skipped = [Skip(source.name(index), reason) for block in blocks for index, reason in block.skipped]
    kept = [source.name(index) for block in blocks for index in block.kept]
    _check_readable(kept, skipped, argument=argument, location=location, strict=strict)
    return ImageSet(
        pixels=_join(blocks, cache),
        names=kept,
        location=location,
        sha256=digest(size, fit, *(item for block in blocks for item in block.hashes)),
        skipped=skipped,
    )


class _Block(NamedTuple):
    """What there is to know of a block whose pixels lie in the cache."""

    first: int
    key: str
    hashes: list[str]
    kept: list[int]
    skipped: list[tuple[int, str]]
    sizes: dict[Size, int]  # of each size the first image
    channels: int


class _Blocks(Dataset[_Block | OSError]):
    """A data set whose samples are blocks; pixels go to the cache, so that little passes between processes."""

    def __init__(self, source: Source, cache: BlockCache, size: Size | None, fit: Fit) -> None:
        self.source, self.cache, self.size, self.fit = source, cache, size, fit

    def __len__(self) -> int:
        return -(-len(self.source) // BLOCK)

    def __getitem__(self, number: int) -> _Block | OSError:
        try:
            return self._block(number * BLOCK)
        except OSError as error:  # as a value, for a DataLoader would turn a full disk into a page of traceback
            return error

    def _block(self, first: int) -> _Block:
        data = [self._read(index) for index in range(first, min(first + BLOCK, len(self.source)))]
        hashes = [_hash(item) for item in data]
        key = digest("images", pillow_version, self.size, self.fit, *hashes)
        stored = self.cache.load(key)
        if stored is None:
            stored = _pack([self._decode(item) for item in data])
            self.cache.store(key, stored)
        notes = json.loads(stored["notes"].numpy().tobytes())
        return _Block(
            first=first,
            key=key,
            hashes=hashes,
            kept=[first + offset for offset in notes["kept"]],
            skipped=[(first + offset, reason) for offset, reason in notes["skipped"]],
            sizes={(height, width): first + offset for height, width, offset in notes["sizes"]},
            channels=notes["channels"],
        )

    def _read(self, index: int) -> bytes | Pixels | Exception:
        try:
            return self.source.read(index)
        except Exception as error:
            return error

    def _decode(self, data: bytes | Pixels | Exception) -> Pixels | Exception:
        try:
            return data if isinstance(data, Exception) else decode(data, size=self.size, fit=self.fit)
        except Exception as error:  # decoders raise whatever damaged bytes provoke
            return error


def _check_memory(number: int, size: Size) -> None:
    needed, free = number * size[0] * size[1] * 3, psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"Argument `resize` expected a size at which {number:,} images fit into {free / 2**30:.1f} GiB of memory, "
            f"but got {size[1]}x{size[0]}, which takes {needed / 2**30:.1f} GiB. Choose a smaller one."
        )


def _hash(data: bytes | Pixels | Exception) -> str:
    if isinstance(data, np.ndarray):
        return digest(data.dtype.str, *data.shape, data.tobytes())
    return digest(data if isinstance(data, bytes) else reason_of(data))


def _pack(decoded: Sequence[Pixels | Exception]) -> dict[str, Tensor]:
    """Put the images of a block into one tensor, and what is known of them into another."""
    images = {offset: item for offset, item in enumerate(decoded) if not isinstance(item, Exception)}
    sizes: dict[Size, int] = {}
    for offset, image in images.items():
        sizes.setdefault((image.shape[0], image.shape[1]), offset)
    channels = max((image.shape[2] for image in images.values()), default=1)
    notes = {
        "kept": list(images),
        "skipped": [(offset, reason_of(item)) for offset, item in enumerate(decoded) if isinstance(item, Exception)],
        "sizes": [(*size, offset) for size, offset in sizes.items()],
        "channels": channels,
    }
    packed = {"notes": torch.frombuffer(bytearray(json.dumps(notes).encode()), dtype=torch.uint8)}
    if len(sizes) == 1:
        stacked = np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images.values()])
        packed["pixels"] = torch.from_numpy(stacked).permute(0, 3, 1, 2)
    return packed


def _loader(dataset: _Blocks, workers: int | None) -> DataLoader[_Block | OSError]:
    mine = range(rank(), len(dataset), world_size())
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if len(mine) > FEW else 0
    return DataLoader(dataset, batch_size=None, sampler=mine, num_workers=workers, collate_fn=_unchanged)


def _unchanged(block: Any) -> Any:
    return block


def _check_sizes(blocks: Sequence[_Block], source: Source, argument: str) -> None:
    sizes: dict[Size, int] = {}
    for block in blocks:
        sizes = block.sizes | sizes
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise ValueError(
            f"Argument `{argument}` expected images of one size, but got '{printable(source.name(first))}' with "
            f"{one[1]}x{one[0]} pixels and '{printable(source.name(second))}' with {other[1]}x{other[0]}. "
            "Say with --resize what size to bring them to."
        )


def _check_readable(
    kept: Sequence[str], skipped: Sequence[Skip], *, argument: str, location: str, strict: bool
) -> None:
    if skipped and (strict or not kept):
        name, reason = skipped[0]
        wanted = "images that can all be read" if strict and kept else "at least one readable image"
        remedy = "Remove it, or leave out --strict to list and skip it." if strict and kept else "Check the path."
        raise ValueError(
            f"Argument `{argument}` expected {wanted}, but got '{location}' with {len(skipped)} of "
            f"{len(kept) + len(skipped)} unreadable, the first '{printable(name)}' ({reason}). {remedy}"
        )


def _join(blocks: Sequence[_Block], cache: BlockCache) -> Tensor:
    """Put all blocks into one tensor, filled block by block so that there is never a second copy of all."""
    channels = max(block.channels for block in blocks)
    height, width = next(size for block in blocks for size in block.sizes)
    pixels = torch.empty(sum(len(block.kept) for block in blocks), channels, height, width, dtype=torch.uint8)
    start = 0
    for block in blocks:
        if block.kept:
            # Grey blocks of an RGB set are repeated over the channels.
            pixels[start : start + len(block.kept)] = cache.require(block.key)["pixels"]
            start += len(block.kept)
    return pixels
