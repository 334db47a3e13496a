"""Read sets of images on all cores, bring them to 8 bits by one range, and keep account of what was read."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
import torch
from PIL import __version__ as pillow_version
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_iet.audit.cache import BlockCache, all_or_none, gather, rank, world_size
from lightning_iet.data.decoding import (
    HALF_READ,
    Background,
    Channels,
    Decoded,
    Depth,
    Fit,
    Page,
    Size,
    decode_stored,
    to_channels,
)
from lightning_iet.data.formats import RANGES, Range, ValueRange, choose_ranges
from lightning_iet.data.samples import Skip, reason_of
from lightning_iet.data.sources import Data, PagedSource, Source, left_alone_by, unread_beside
from lightning_iet.utilities.files import printable
from lightning_iet.utilities.fingerprints import digest
from lightning_iet.utilities.progress import progress_bar

DECODER = 9  # raised with every change of decoding that changes pixels, here or in what this calls
BLOCK = 256  # images that are read, stored and looked up together
DIM = 0.6  # largest value of floating point below which its range is doubtful
DEEP: tuple[Depth, ...] = ("integers", "floating point")
FEW = 4  # blocks up to which starting processes takes longer than reading
_SHRUNK = 44_000  # bytes that the grey versions of an image of more than 64 pixels take while they are gathered


@dataclass(frozen=True)
class Origin:
    """How the images of a set were stored.

    Attributes:
        kinds: Number of images by format, such as ``{"PNG": 60}``; ``"array"`` for those of an array.
        sizes: Number of images by height and width before resizing, as ``"96x64"`` (width x height).
        deep: Number of images of more than 8 bits.
        transparent: Number of images with transparency.
        pages: Number of images that are one of several pages of a file.
        unread: Share of the files that could not be read; a page counts as its part of a file, one that is cut off as
            a whole file.
        value_range: Values that became black and white, where there are images of more than 8 bits.
        values: Least and largest value stored in these.
        background: Colour under transparent pixels that was named; ``None`` = none was, and white was laid under them.
        range_found: Whether that range was found out from these values rather than given: of integers, and of floating
            point that keeps below 0.6 of its range.
        mixed: Whether ``value_range`` is that of integers, and floating point beside them has its own, 0 to 1.
    """

    kinds: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    deep: int = 0
    transparent: int = 0
    pages: int = 0
    unread: float = 0.0
    value_range: Range | None = None
    values: Range | None = None
    background: Background | None = None
    range_found: bool = False
    mixed: bool = False


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in memory.

    Attributes:
        pixels: uint8, shape ``(N, C, H, W)``, grey or RGB.
        names: One for each.
        location: Where they come from, for people.
        sha256: Hash of their content, their order and how they were decoded.
        skipped: What could not be read, beside the ``N``.
        hashes: SHA-256 of the file or the array of each image, with ``:4`` behind it for the fourth page of a file of
            several; empty for images that were never stored.
        origin: How they were stored.
        left_alone: What other files lie beside them, in words.
        beside: Of these, by suffix, the number of files that may hold images.
    """

    pixels: Tensor
    names: Sequence[str]
    location: str
    sha256: str
    skipped: Sequence[Skip] = field(default=())
    hashes: Sequence[str] = field(default=())
    origin: Origin = field(default_factory=Origin)
    left_alone: str = ""
    beside: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pixels)


def image_set(pixels: Tensor, *, location: str) -> ImageSet:
    """Wrap images that are in memory already, such as those that a model has just drawn.

    Args:
        pixels: uint8, shape ``(N, C, H, W)``, grey or RGB.
        location: Where they come from, for people.

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


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How images are read.

    Attributes:
        size: Height and width to resize to; ``None`` wants images of one size.
        fit: Whether an image of another shape is stretched or its middle is cropped; ``None`` refuses such images.
        value_range: Values of black and white in images of more than 8 bits, see
            :func:`~lightning_iet.data.formats.parse_range`.
        background: Colour under transparent pixels; ``None`` = white, which was not named.
        strict: Refuse what cannot be read, instead of listing it.
        workers: Processes that decode; 0 = this one alone, ``None`` = one for each core.
    """

    size: Size | None = None
    fit: Fit | None = None
    value_range: ValueRange = "auto"
    background: Background | None = None
    strict: bool = False
    workers: int | None = None

    @property
    def colour(self) -> Background:
        """Colour that is laid under transparent pixels."""
        return self.background or "white"


def read_sets(
    sources: Mapping[str, Source], cache: BlockCache, *, locations: Mapping[str, str], reading: Reading
) -> dict[str, ImageSet]:
    """Read all images of several sources, together with the other processes.

    Blocks of images that were decoded before are taken from the cache if the bytes are still the same.

    Args:
        sources: Where they come from, by the names of the arguments.
        cache: Where their pixels go.
        locations: Where they lie, for people.
        reading: How to read them.

    Returns:
        The images, in the order of the sources; grey if all of a set are.

    Raises:
        ValueError: No image of a set can be read; sizes differ without ``size``; shapes would change without ``fit``;
            ``strict`` meets an unreadable image; or memory does not suffice.
    """
    if reading.size is not None:
        _check_memory(sum(map(len, sources.values())), reading.size)
    found = {name: _read_blocks(source, cache, name, locations[name], reading) for name, source in sources.items()}
    limits = {name: _limits(blocks) for name, blocks in found.items()}
    given = reading.value_range
    integers = {name: (limit.low, limit.high) for name, limit in limits.items() if limit.integers}
    ranges = {name: {depth: RANGES[depth] if isinstance(given, str) else given for depth in DEEP} for name in found}
    if given == "auto":
        _check_one_depth(limits, locations)
        for name, chosen in choose_ranges(integers).items():
            ranges[name]["integers"] = chosen
    # Of floating point nothing is found out: it lies in [0, 1], or is refused. But one that keeps far below 1 may be
    # made for another range.
    dim = {name for name, limit in limits.items() if 0 < limit.high < DIM}  # 0: none of more than 8 bits
    found_out = {*integers, *dim} if given == "auto" else set()
    return {
        name: _join(
            sources[name], blocks, cache, locations[name], ranges[name], limits[name], name in found_out, reading
        )
        for name, blocks in found.items()
    }


def with_channels(images: ImageSet, channels: Channels) -> ImageSet:
    """Bring a set to grey or to colour, as a data module does for training.

    Args:
        images: The set.
        channels: 1 for grey, by ITU-R 601's weights; 3 for colour.

    Returns:
        The set, of another hash if it has changed.

    Example:
        >>> red = image_set(torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1), location="red")
        >>> with_channels(red, 1).pixels.flatten().tolist()
        [76]
    """
    if images.pixels.shape[1] == channels:
        return images
    parts = [torch.stack([to_channels(image / 255, channels) for image in part]) for part in images.pixels.split(256)]
    pixels = torch.cat([(part * 255).round().to(torch.uint8) for part in parts])
    return replace(images, pixels=pixels, sha256=digest("channels", channels, images.sha256))


def read_images(
    source: Source, cache: BlockCache, *, argument: str, location: str, reading: Reading | None = None
) -> ImageSet:
    """Read one set; see :func:`read_sets`."""
    return read_sets({argument: source}, cache, locations={argument: location}, reading=reading or Reading())[argument]


class _Block(NamedTuple):
    """What there is to know of a block whose pixels lie in the cache."""

    first: int
    key: str
    hashes: list[str]
    kept: list[int]
    skipped: list[tuple[int, str]]
    sizes: dict[Size, int]  # of each size the first image
    channels: int
    facts: dict[str, Any]


class _Blocks(Dataset[_Block | OSError]):
    """A data set whose samples are blocks; pixels go to the cache, so that little passes between processes."""

    def __init__(self, source: Source, cache: BlockCache, reading: Reading) -> None:
        self.source, self.cache, self.reading = source, cache, reading

    def __len__(self) -> int:
        return -(-len(self.source) // BLOCK)

    def __getitem__(self, number: int) -> _Block | OSError:
        try:
            return self._block(number * BLOCK)
        except OSError as error:  # as a value, for a DataLoader would turn a full disk into a page of traceback
            return error

    def _block(self, first: int) -> _Block:
        data = [self._read(index) for index in range(first, min(first + BLOCK, len(self.source)))]
        hashes = _hashes(data)
        how = self.reading
        # The range too: it decides what a decoder returns, such as a DICOM file in its window or in values.
        options = (how.size, how.fit, how.colour, how.value_range)
        key = digest("images", DECODER, pillow_version, *options, *hashes)
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
            facts=notes["facts"],
        )

    def _read(self, index: int) -> Data | Exception:
        try:
            return self.source.read(index)
        except Exception as error:
            return error

    def _decode(self, data: Data | Exception) -> Decoded | Exception:
        how = self.reading
        options: dict[str, Any] = {"size": how.size, "fit": how.fit or "crop", "background": how.colour}
        try:
            return data if isinstance(data, Exception) else decode_stored(data, value_range=how.value_range, **options)
        except Exception as error:  # decoders raise whatever damaged bytes provoke
            return error


def _read_blocks(source: Source, cache: BlockCache, argument: str, location: str, reading: Reading) -> Sequence[_Block]:
    """Decode a set, and refuse it if it cannot be compared."""
    blocks: list[_Block] = []
    dataset = _Blocks(source, cache, reading)
    with all_or_none(), progress_bar(f"Reading {argument} images", len(source), hidden=rank() > 0) as bar:
        for block in _loader(dataset, reading.workers):
            if isinstance(block, OSError):
                raise block
            _check_sizes([*blocks[:1], block], source, argument)
            blocks.append(block)
            bar.show(min(block.first + len(block.hashes), len(source)))
    blocks = sorted((block for part in gather(blocks) for block in part), key=lambda block: block.first)
    _check_sizes(blocks, source, argument)
    _check_readable(blocks, source, argument=argument, location=location, strict=reading.strict)
    if reading.size is not None and reading.fit is None:
        _check_shapes(blocks, source, reading.size, argument)
    return blocks


class _Limits(NamedTuple):
    """Least and largest value of the images of more than 8 bits, and what they are."""

    low: float
    high: float
    integers: bool
    floating: bool


def _limits(blocks: Sequence[_Block]) -> _Limits:
    values = [block.facts["values"] for block in blocks if block.facts["values"]]
    low, high = (min(v[0] for v in values), max(v[1] for v in values)) if values else (0.0, 0.0)
    depths = {depth for block in blocks for depth in block.facts["depths"]}
    return _Limits(low, high, "integers" in depths, "floating point" in depths)


def _check_one_depth(limits: Mapping[str, _Limits], locations: Mapping[str, str]) -> None:
    """Refuse sets of which one range would make the integers, or the floating point, all black."""
    for name, found in limits.items():
        if found.integers and found.floating:
            raise ValueError(
                f"Argument `range` expected 'full' or values such as 0:4095 for `{name}`, since integers and floating "
                f"point of more than 8 bits lie side by side in '{locations[name]}', but got 'auto', which is one "
                "range for all. With --range full white is 65535 and 1."
            )


def _join(
    source: Source,
    blocks: Sequence[_Block],
    cache: BlockCache,
    location: str,
    ranges: Mapping[Depth, Range],
    limits: _Limits,
    range_found: bool,
    reading: Reading,
) -> ImageSet:
    """Put all blocks into one tensor, filled block by block so that there is never a second copy of all."""
    channels = max(block.channels for block in blocks)
    height, width = next(size for block in blocks for size in block.sizes)
    pixels = torch.empty(sum(len(block.kept) for block in blocks), channels, height, width, dtype=torch.uint8)
    deep = sum(block.facts["deep"] for block in blocks)
    used = ranges["integers" if limits.integers else "floating point"]
    start = 0
    for block in blocks:
        if block.kept:
            stored = cache.require(block.key)
            part = stored["pixels"]
            for code, depth in enumerate(DEEP, 1):
                if "deep" in stored and (these := stored["deep"] == code).any():
                    low, high = ranges[depth]
                    scaled = ((part.double() - low) * (255 / (high - low))).clamp(0, 255).round()
                    part = torch.where(these[:, None, None, None], scaled, part)
            # Grey blocks of an RGB set are repeated over the channels.
            pixels[start : start + len(block.kept)] = part
            start += len(block.kept)
    files = [block.hashes[index - block.first] for block in blocks for index in block.kept]
    # The range that was asked for, and the one that was found out together with the other sets.
    asked = (reading.value_range, used if deep else None)
    how = (DECODER, pillow_version, reading.size, reading.fit, reading.colour, *asked)
    items = source.items if isinstance(source, PagedSource) else []
    return ImageSet(
        pixels=pixels,
        names=[source.name(index) for block in blocks for index in block.kept],
        location=location,
        sha256=digest(*how, *(item for block in blocks for item in block.hashes)),
        skipped=[Skip(source.name(index), reason) for block in blocks for index, reason in block.skipped],
        hashes=files,
        origin=Origin(
            kinds=_sum(blocks, "kinds"),
            sizes=_sum(blocks, "sizes"),
            deep=deep,
            transparent=sum(block.facts["transparent"] for block in blocks),
            pages=sum(items[index][1] is not None for block in blocks for index in block.kept) if items else 0,
            unread=_unread(source, [index for block in blocks for index, _ in block.skipped]),
            value_range=used if deep else None,
            values=(limits.low, limits.high) if deep else None,
            background=reading.background,
            range_found=range_found,
            mixed=limits.integers and limits.floating and used != ranges["floating point"],
        ),
        left_alone=left_alone_by(source),
        beside=unread_beside(source),
    )


def _unread(source: Source, skipped: Sequence[int]) -> float:
    """Share of a source's files that could not be read, each page as its part of a file.

    A file that is cut off counts whole: nobody knows how many pages it lacks.
    """
    if not isinstance(source, PagedSource):
        return len(skipped) / max(len(source), 1)
    files, cut_off = [file for file, _ in source.items], source.cut_off
    pages = Counter(files)
    part = sum(1 / pages[files[index]] for index in skipped if files[index] not in cut_off)
    return (part + len(cut_off)) / len(pages)


def _sum(blocks: Sequence[_Block], name: Literal["kinds", "sizes"]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for block in blocks:
        total.update(block.facts[name])
    return dict(total.most_common())


def _check_memory(number: int, size: Size) -> None:
    needed, free = number * (size[0] * size[1] * 3 + (max(size) > 64) * _SHRUNK), psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"Argument `image_size` expected a size at which {number:,} images fit into {free / 2**30:.1f} GiB of "
            f"memory, but got {size[1]}x{size[0]}, which takes {needed / 2**30:.1f} GiB. Choose a smaller one."
        )


def _hashes(items: Sequence[Data | Exception]) -> list[str]:
    """SHA-256 of each file, as ``sha256sum`` gives it, with the page; of an array and of a reason with what it is."""
    files: dict[int, str] = {}  # by object: pages of one file share its bytes, which are hashed once

    def of_file(content: bytes) -> str:
        if id(content) not in files:
            files[id(content)] = hashlib.sha256(content).hexdigest()
        return files[id(content)]

    def of(item: Data | Exception) -> str:
        if isinstance(item, np.ndarray):
            return digest(item.dtype.str, *item.shape, item.tobytes())
        if isinstance(item, Page):
            return f"{of_file(item.data)}:{item.number + 1}"
        return of_file(item) if isinstance(item, bytes) else digest(reason_of(item))

    return [of(item) for item in items]


def _pack(decoded: Sequence[Decoded | Exception]) -> dict[str, Tensor]:
    """Put the images of a block into one tensor, and what is known of them into another."""
    images = {offset: item for offset, item in enumerate(decoded) if not isinstance(item, Exception)}
    sizes: dict[Size, int] = {}
    for offset, image in images.items():
        sizes.setdefault((image.pixels.shape[0], image.pixels.shape[1]), offset)
    channels = max((image.pixels.shape[2] for image in images.values()), default=1)
    deep = [image for image in images.values() if image.depth != "8 bits"]
    facts = {
        "kinds": Counter(image.kind for image in images.values()),
        "sizes": Counter(f"{image.size[1]}x{image.size[0]}" for image in images.values()),
        "deep": len(deep),
        "depths": sorted({image.depth for image in deep}),
        "transparent": sum(image.transparent for image in images.values()),
        "values": [min(float(i.pixels.min()) for i in deep), max(float(i.pixels.max()) for i in deep)] if deep else [],
    }
    notes = {
        "kept": list(images),
        "skipped": [(offset, reason_of(item)) for offset, item in enumerate(decoded) if isinstance(item, Exception)],
        "sizes": [(*size, offset) for size, offset in sizes.items()],
        "channels": channels,
        "facts": facts,
    }
    packed = {"notes": torch.frombuffer(bytearray(json.dumps(notes).encode()), dtype=torch.uint8)}
    if len(sizes) == 1:
        arrays = [image.pixels for image in images.values()]
        stacked = np.stack([np.broadcast_to(array, (*array.shape[:2], channels)) for array in arrays])
        packed["pixels"] = torch.from_numpy(stacked).permute(0, 3, 1, 2)
        if deep:
            depths: tuple[Depth, ...] = ("8 bits", *DEEP)
            packed["deep"] = torch.tensor([depths.index(i.depth) for i in images.values()], dtype=torch.uint8)
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
            "Say with --image-size what size to bring them to."
        )


def _check_shapes(blocks: Sequence[_Block], source: Source, size: Size, argument: str) -> None:
    """Refuse to change the shape of an image, for nobody has said how the generator's images came by theirs."""
    for name in _sum(blocks, "sizes"):
        width, height = map(int, name.split("x"))
        scale = max(size[0] / height, size[1] / width)
        if max(height * scale - size[0], width * scale - size[1]) > 1:
            raise ValueError(
                f"Argument `{argument}` expected images of the shape of {size[1]}x{size[0]}, but got some of {name}. "
                "Say as the generator was trained: --fit crop takes the middle (as `lightning-iet fit` does), --fit "
                "stretch changes their proportions."
            )


def _check_readable(blocks: Sequence[_Block], source: Source, *, argument: str, location: str, strict: bool) -> None:
    skipped = [item for block in blocks for item in block.skipped]
    kept = sum(len(block.kept) for block in blocks)
    if not skipped or (kept and not strict):
        return
    index, reason = skipped[0]
    wanted = "images that can all be read" if strict and kept else "at least one readable image"
    remedy = "Remove it, or leave out --strict to list and skip it." if strict and kept else "Check the path."
    if "black and white is not known" in reason:
        remedy = "Say with --range LOW:HIGH which values are black and white, such as --range 0:255."
    if HALF_READ in reason:
        remedy = "Say --range full if so, or save them in 8 bits."
    raise ValueError(
        f"Argument `{argument}` expected {wanted}, but got '{location}' with {len(skipped)} of "
        f"{kept + len(skipped)} unreadable, the first '{printable(source.name(index))}' ({reason}). {remedy}"
    )
