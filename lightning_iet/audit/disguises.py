"""Copies that hide behind a change: recoloured, mirrored, shifted, turned, zoomed, cropped or blurred ones.

Three searches stand beside the one by plain distances. Held-out images go through all of them in the same way, so that
how near an innocent image comes by these liberties is known.

*Recoloured*: grey images, mean removed and norm one, compared by the absolute correlation as they are, mirrored, upside
down, and, if they are square, turned by right angles and with exchanged axes, as slices are often read. Brightness,
contrast, inversion and the order of channels make no difference; gamma and JPEG little.

*Degraded*: the same at 8 x 8 pixels, where blur, noise and strong compression leave no trace.

*Moved*: candidates from features that a shift, a turn or a zoom changes little, each registered with the image (see
:mod:`~lightning_iet.functional.registration`). Its distance is that over the overlap.

All judge by the ratio to the next training image that shows something else, since clothes, faces and scans of one kind
are more alike than a photograph and its JPEG copy. Near-duplicates that are known show the same; where all candidates
are of one group of them, half give place to the best of the other images.
"""

from collections.abc import Callable, Collection, Sequence
from functools import cache as cached
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_iet.audit.cache import BlockCache, Progress, in_blocks
from lightning_iet.audit.reading import ImageSet
from lightning_iet.functional.registration import (
    COARSE,
    correlate_templates,
    grey_images,
    pyramid_sizes,
    register,
)
from lightning_iet.metrics.features import EfficientNetFeatures
from lightning_iet.utilities.devices import full_precision
from lightning_iet.utilities.fingerprints import digest, tensor_bytes

FLIPS = tuple(
    map
    for x, y in ((1, 1), (-1, 1), (1, -1), (-1, -1))  # as it is, mirrored, upside down, turned by 180 degrees
    for map in (((x, 0), (0, y)), ((0, x), (y, 0)))  # and all these with x and y exchanged
)
"""Linear maps from coordinates of an image to those of the training image; of images that are not square the first of
each pair alone."""
SIDE, JUDGED = 32, 64  # pixels of the images that are searched for and of those that are judged
DEGRADED = 8  # likewise, of images that may be degraded
SIDES = (JUDGED, SIDE, COARSE, DEGRADED)  # of large images
LEAST_SIDE = 16  # pixels below which images are too small to be degraded, or to be registered
CANDIDATES = 16  # of the searches for recoloured and for degraded copies, judged exactly
LEAST_SPREAD = 0.25 / 255  # standard deviation below which an image shows one colour only

NETWORK_SIDE = 64  # pixels: at 224 the network takes 40 times as long and finds hardly more
BY_NETWORK, BY_SPECTRUM, BY_THUMBNAIL, BY_COLOUR = 16, 8, 8, 4  # candidates of the search for moved copies
REGISTERED = 8  # of them, those that correlate best, are registered
BLOCK, MOVED_BLOCK, NETWORK_BLOCK = 512, 64, 256  # images that are worked on, and kept, together
NETWORK_BATCH = 32  # images that go through the network together on a CPU: of more, layers give more than 32 MiB
CHUNK = 8192  # training images in one matrix product
_VALUES = 2**21  # of images that are undone, or brought to all sizes, at once
_PIXELS = 2**18  # of candidates that are judged together: more do not stay in the caches of a CPU
_DEPTH = 1024  # products of levels less 128 whose sum is exact in single precision
VERSION = 11  # to be raised when results change


class Matches(NamedTuple):
    """The training image that each of ``Q`` images is the most alike once a disguise is undone.

    Attributes:
        distances: ``sqrt(1 - c²)`` with their correlation ``c``, in [0, 1], shape ``(Q,)``.
        ratios: the distance over that to the next training image that shows something else, in [0, 1], shape ``(Q,)``.
        indices: positions of the training images, int64, shape ``(Q,)``.
        maps: from coordinates of the image to those of the training image, both from -1 to 1, shape ``(Q, 2, 3)``.
    """

    distances: Tensor
    ratios: Tensor
    indices: Tensor
    maps: Tensor


class _Greys(NamedTuple):
    """Grey images at every size that the searches need: of many small images when asked, of others brought there once.

    Attributes:
        pixels: of the images, uint8, shape ``(N, C, H, W)``.
        made: by size, float32, shape ``(N, 1, *size)``; empty for many images that are small already.
    """

    pixels: Tensor
    made: dict[tuple[int, int], Tensor]

    def at(self, size: tuple[int, int], rows: Tensor | slice) -> Tensor:
        """Return some of the images at a size, in [0, 1], shape ``(B, 1, *size)``."""
        return self.made[size][rows] if size in self.made else _shrunk(self.pixels[rows], size)[-1]


class _Candidates(NamedTuple):
    """What is known of the ``K`` candidates of each of ``Q`` images, shape ``(Q, K)`` and ``(Q, K, 2, 3)``."""

    distances: Tensor
    indices: Tensor
    maps: Tensor


def find_disguised(
    images: ImageSet,
    train: ImageSet,
    *,
    cache: BlockCache,
    argument: str,
    device: str = "cpu",
    group: Tensor | None = None,
    moved: bool | Tensor = True,
) -> dict[str, Matches]:
    """Search for recoloured, for degraded and perhaps for moved copies.

    Args:
        images: the ``Q`` images to search for.
        train: the images to search among.
        cache: where finished blocks go.
        argument: what the images are, for the bar.
        device: where to compute.
        group: number of the group of near-duplicates of each training image, shape ``(N,)``, where they are known.
        moved: whether moved copies are looked for; or for which images, bool, shape ``(Q,)``: the others get a ratio
            of 1.

    Returns:
        The matches, by ``"recoloured"``, ``"degraded"`` (of images of at least 16 pixels) and ``"moved"``.
    """
    shared: dict[str, Any] = {"cache": cache, "argument": argument, "device": device, "group": group}
    recoloured, candidates = find_flipped(images, train, kind="recoloured", **shared)
    found = {"recoloured": recoloured}
    if min(train.pixels.shape[2:]) >= LEAST_SIDE:
        found["degraded"] = find_flipped(images, train, kind="degraded", **shared)[0]
    if isinstance(moved, bool):
        return found | ({"moved": find_moved(images, train, candidates, **shared)} if moved else {})
    if not moved.any():
        return found
    part = ImageSet(images.pixels[moved], [], images.location, digest("part", images.sha256, *moved.tolist()))
    near = find_moved(part, train, candidates[moved], **shared)
    whole = [*(torch.ones_like(part) for part in recoloured[:2]), *(part.clone() for part in recoloured[2:])]
    for own, other in zip(near, whole, strict=True):
        other[moved] = own
    return found | {"moved": Matches(*whole)}


def find_flipped(
    images: ImageSet,
    train: ImageSet,
    *,
    kind: Literal["recoloured", "degraded"],
    cache: BlockCache,
    argument: str,
    device: str = "cpu",
    group: Tensor | None = None,
) -> tuple[Matches, Tensor]:
    """Search for copies that may be mirrored, and whose colours or whose details were changed.

    Args:
        images: the images to search for.
        train: the images to search among.
        kind: what was changed.
        cache: where finished blocks go.
        argument: what the images are, for the bar.
        device: where to compute.
        group: as :func:`find_disguised`.

    Returns:
        The matches, and the nearest candidates of each image, int64, shape ``(Q, min(4, N))``, on the CPU.
    """
    side, judged = (SIDE, JUDGED) if kind == "recoloured" else (DEGRADED, DEGRADED)
    own, greys = (
        _greys(part, {side, judged}, cache=cache, argument=name)
        for part, name in ((images, argument), (train, "train"))
    )
    references = cached(lambda: _standard_rows(greys, slice(0, len(train)), device, side))  # if a block is not cached
    count = min(CANDIDATES, len(train))
    positions = positions_of(images.pixels)  # not those of thumbnails, which are square where images are not

    def search(place: slice, _: Progress) -> dict[str, Tensor]:
        pixels = images.pixels[place]
        with full_precision(torch.device(device).type):
            queries = _standard_rows(own, place, device, side)
            queries = queries.view(len(pixels), *_side(pixels, side))
            indices, flips = _correlated(queries, references(), count, positions, group)
        maps = torch.zeros(*indices.shape, 2, 3)
        maps[..., :2] = torch.tensor(FLIPS, dtype=torch.float32)[flips.cpu()]
        size = _side(pixels, judged)
        found = _judge_flipped(own.at(size, place), greys, indices.cpu(), maps, size)
        nearest = _nearest(greys, found, size, group)
        return {**nearest._asdict(), "candidates": found.indices[:, :BY_COLOUR]}

    starts = range(0, len(images), BLOCK)
    blocks = in_blocks(
        f"Looking for {kind} copies among {argument} images",
        [digest(kind, VERSION, *_key(train), *_key(images), *_key_of(group), start) for start in starts],
        search,
        cache=cache,
        total=len(images),
        block=BLOCK,
    )
    joined = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    return Matches(*(joined[name] for name in Matches._fields)), joined["candidates"]


def find_moved(
    images: ImageSet,
    train: ImageSet,
    candidates: Tensor,
    *,
    cache: BlockCache,
    argument: str,
    device: str = "cpu",
    group: Tensor | None = None,
) -> Matches:
    """Search for copies that were shifted, turned, zoomed, cropped or blurred.

    Args:
        images: the images to search for.
        train: the images to search among.
        candidates: further candidates of each image, as :func:`find_flipped` returns them, shape ``(Q, K)``.
        cache: where finished blocks go.
        argument: what the images are, for the bar.
        device: where to compute.
        group: as :func:`find_disguised`.

    Returns:
        The matches, on the CPU.
    """
    references = moved_rows(train, cache=cache, argument="train", device=device)
    rows, mirrored = (
        moved_rows(part, cache=cache, argument=argument, device=device) for part in (images, _mirrored(images))
    )
    counts = [min(count, len(train)) for count in (BY_NETWORK, BY_SPECTRUM, BY_THUMBNAIL)]
    own_greys, greys = (
        _greys(part, {COARSE, SIDE, JUDGED}, cache=cache, argument=name)
        for part, name in ((images, argument), (train, "train"))
    )

    def search(place: slice, _: Progress) -> dict[str, Tensor]:
        near = [candidates[place]]
        for own, other, reference, count in zip(rows, mirrored, references, counts, strict=True):
            likeness = (own[place].to(device) @ reference.to(device).T).abs()
            likeness = torch.maximum(likeness, (other[place].to(device) @ reference.to(device).T).abs())
            near.append(_most_alike(likeness, count, None if group is None else group.to(device)).cpu())
        found = _register(own_greys, place, greys, torch.cat(near, dim=1), device, group)
        return _nearest(greys, found, _side(train.pixels, JUDGED), group)._asdict()

    starts = range(0, len(images), MOVED_BLOCK)
    blocks = in_blocks(
        f"Looking for moved copies among {argument} images",
        [digest("moved", VERSION, *_key(train), *_key(images), *_key_of(group), start) for start in starts],
        search,
        cache=cache,
        total=len(images),
        block=MOVED_BLOCK,
    )
    return Matches(*(torch.cat([block[name] for block in blocks]) for name in Matches._fields))


def moved_rows(images: ImageSet, *, cache: BlockCache, argument: str, device: str) -> Sequence[Tensor]:
    """Describe images by features that a shift, a turn or a zoom changes little.

    Args:
        images: ``N`` images.
        cache: where finished blocks go.
        argument: what the images are, for the bar.
        device: where the network runs.

    Returns:
        Rows of norm one: features of EfficientNet at 64 x 64 pixels, amplitudes of the Fourier transform, thumbnails of
        8 x 8 pixels; shape ``(N, D)`` each, float32.
    """

    def describe(place: slice, _: Progress) -> dict[str, Tensor]:
        network = _network(device)  # only if something is missing in the cache
        pixels = images.pixels[place].to(device)
        with full_precision(torch.device(device).type), torch.inference_mode():
            grey = grey_images(pixels, _side(pixels, SIDE))
            batch = NETWORK_BATCH if pixels.device.type == "cpu" else NETWORK_BLOCK
            seen = torch.cat([network(part) for part in pixels.split(batch)])
            parts = {"network": seen, "spectrum": _spectrum(grey), "thumbnail": _thumbnail(grey)}
        return {name: F.normalize(rows.float()).cpu() for name, rows in parts.items()}

    blocks = in_blocks(
        f"Describing {argument} images",
        [digest("describing", VERSION, *_key(images), start) for start in range(0, len(images), NETWORK_BLOCK)],
        describe,
        cache=cache,
        total=len(images),
        block=NETWORK_BLOCK,
    )
    return [torch.cat([block[name] for block in blocks]) for name in ("network", "spectrum", "thumbnail")]


@cached
def _network(device: str) -> EfficientNetFeatures:
    """Build the network once for all sets: that takes as long as it does for some hundred images."""
    return EfficientNetFeatures(size=NETWORK_SIDE).to(device)


def undo(images: Tensor, originals: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Bring training images into the place and the colours of the images that may be copies of them.

    Colours are fitted by least squares: every channel of the image as a linear function of all channels of the
    original, over the overlap. So the order of channels, inversion, brightness and contrast of each are undone.

    Args:
        images: uint8, shape ``(B, C, H, W)``.
        originals: the training images, likewise.
        maps: of :class:`Matches`, shape ``(B, 2, 3)``.

    Returns:
        The originals as the images would show them, uint8, shape ``(B, C, H, W)``, black outside the overlap; and the
        peak signal-to-noise ratio over the overlap, in dB, shape ``(B,)``: infinite where nothing differs.

    Example:
        >>> image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
        >>> undo(2 * image.flip(-1) + 1, image, torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]]))[1]
        tensor([inf])
    """
    if not len(images):
        return images, torch.empty(0)
    parts = zip(*(part.split(max(1, _VALUES // images[:1].numel())) for part in (images, originals, maps)), strict=True)
    with full_precision(images.device.type):
        found = [_undo(*part) for part in parts]
    return torch.cat([undone for undone, _ in found]), torch.cat([noise for _, noise in found])


def _undo(images: Tensor, originals: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = images.shape
    grid = F.affine_grid(maps, [batch, 1, height, width], align_corners=False)
    # Levels less 128, for sums of up to 1024 products of them are exact in single precision; sums of these are double.
    warped = F.grid_sample(originals.float().sub_(128), grid, padding_mode="border", align_corners=False)
    inside = (grid.abs() <= 1 + 1e-4).all(dim=-1).flatten(1).float()[:, None]
    known = torch.cat([warped.flatten(2), torch.ones_like(inside)], dim=1).mul_(inside)
    target = images.flatten(2).float().sub_(128).mul_(inside)
    normal = _products(known, known)
    ridge = (1e-12 * normal.diagonal(dim1=1, dim2=2).amax(dim=1) + 1e-6)[:, None, None]  # for channels that are equal
    normal += ridge * torch.eye(channels + 1, device=images.device)
    weights = torch.linalg.solve(normal, _products(known, target)).float()
    fitted = (weights.mT @ known).round_().clamp_(-128, 127)
    error = _chunks(target.sub_(fitted).mul_(inside)).square_().sum(dim=-1).sum(dim=(1, 2), dtype=torch.double)
    error /= (inside.sum(dim=(1, 2), dtype=torch.double) * channels).clamp(min=1)
    noise = torch.where(error > 0, 10 * torch.log10(255**2 / error.clamp(min=1e-12)), torch.inf)
    return fitted.add_(128).mul_(inside).view(images.shape).to(torch.uint8), noise.float()


def _products(one: Tensor, other: Tensor) -> Tensor:
    """Scalar products of all pairs of rows, shape ``(B, C, D)``, double, of rows ``(B, C, P)`` and ``(B, D, P)``."""
    parts = (_chunks(rows).transpose(1, 2) for rows in (one, other))
    return (next(parts) @ next(parts).mT).sum(dim=1, dtype=torch.double)


def _chunks(rows: Tensor) -> Tensor:
    """Cut rows into pieces of 1024 values, the last one filled up with zeros: shape ``(…, pieces, 1024)``."""
    return F.pad(rows, (0, -rows.shape[-1] % _DEPTH)).unflatten(-1, (-1, _DEPTH))


def positions_of(pixels: Tensor) -> list[int]:
    """Return which of :data:`FLIPS` are looked for: images that are not square keep their axes.

    Example:
        >>> positions_of(torch.zeros(1, 3, 64, 48)), len(positions_of(torch.zeros(1, 3, 64, 64)))
        ([0, 2, 4, 6], 8)
    """
    is_square = pixels.shape[-2] == pixels.shape[-1]
    return [number for number, flip in enumerate(FLIPS) if flip[0][0] or is_square]


def flipped(pictures: Tensor, number: int) -> Tensor:
    """Undo one of :data:`FLIPS`: bring images into the position of the training image.

    Args:
        pictures: Shape ``(…, H, W)``.
        number: Position in :data:`FLIPS`.

    Returns:
        A copy, or a view.

    Example:
        >>> [flipped(torch.tensor([[1, 2], [3, 4]]), number).flatten().tolist() for number in (0, 1, 2)]
        [[1, 2, 3, 4], [1, 3, 2, 4], [2, 1, 4, 3]]
    """
    flip = FLIPS[number]
    return (pictures.mT if flip[0][0] == 0 else pictures).flip([-1 - i for i in (0, 1) if sum(flip[i]) < 0])


def _key(images: ImageSet) -> tuple[object, ...]:
    return images.sha256, *images.pixels.shape


def _key_of(group: Tensor | None) -> tuple[bytes, ...]:
    return () if group is None else (tensor_bytes(group),)


def _mirrored(images: ImageSet) -> ImageSet:
    return ImageSet(images.pixels.flip(-1), images.names, images.location, digest("mirrored", images.sha256))


def _side(pixels: Tensor, largest: int) -> tuple[int, int]:
    height, width = pixels.shape[-2:]
    return (height, width) if max(height, width) <= largest else (largest, largest)


def _greys(images: ImageSet, wanted: Collection[int], *, cache: BlockCache, argument: str) -> _Greys:
    """Bring large images to all sizes, once for all searches, and take those that are wanted into memory."""
    if max(images.pixels.shape[2:]) <= JUDGED or not len(images):
        few = 0 < images.pixels.numel() <= _VALUES
        sizes = {_side(images.pixels, side) for side in wanted} if few else ()
        return _Greys(images.pixels, {size: _shrunk(images.pixels, size)[-1] for size in sizes})

    def shrink(place: slice, progress: Progress) -> dict[str, Tensor]:
        parts: list[list[Tensor]] = []
        for part in images.pixels[place].split(max(1, _VALUES // images.pixels[0].numel())):
            parts.append(_shrunk(part, (DEGRADED, DEGRADED)))
            progress(sum(len(done[0]) for done in parts))
        return {str(side): torch.cat(made) for side, made in zip(SIDES, zip(*parts, strict=True), strict=True)}

    blocks = in_blocks(
        f"Shrinking {argument} images",
        [digest("shrinking", VERSION, *_key(images), start) for start in range(0, len(images), BLOCK)],
        shrink,
        cache=cache,
        total=len(images),
        block=BLOCK,
    )
    return _Greys(images.pixels, {(side, side): torch.cat([block[str(side)] for block in blocks]) for side in wanted})


def _shrunk(pixels: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Bring images to a size: large ones by way of all larger :data:`SIDES`, so that they are read once.

    Returns:
        The grey images at all sizes on the way, shape ``(N, 1, …)`` each; the last has the size.
    """
    if max(pixels.shape[2:]) <= JUDGED:
        return [grey_images(pixels, size)]
    made = [grey_images(pixels, (JUDGED, JUDGED))]
    for side in SIDES[1 : SIDES.index(size[0]) + 1]:
        made.append(grey_images(made[-1], (side, side)))
    return made


def _standard_rows(greys: _Greys, place: slice, device: str, side: int) -> Tensor:
    """Grey images with mean 0 and norm 1, shape ``(N, D)``; zeros for images of one colour."""
    size = _side(greys.pixels, side)
    starts = range(place.start, place.stop, BLOCK)
    parts = [greys.at(size, slice(start, min(start + BLOCK, place.stop))) for start in starts]
    rows = [_standardized(part.flatten(1).to(device)) for part in parts]
    return torch.cat(rows) if rows else torch.empty(0, size[0] * size[1], device=device)


def _standardized(rows: Tensor) -> Tensor:
    rows = rows - rows.mean(dim=1, keepdim=True)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(norms > LEAST_SPREAD * rows.shape[1] ** 0.5, rows / norms.clamp(min=1e-12), 0)


def _most_alike(likeness: Tensor, count: int, group: Tensor | None) -> Tensor:
    """Positions of the largest values of each row; where all are of one group, half are the largest of other groups.

    ``likeness`` has shape ``(Q, N)``, ``group`` that or ``(N,)``.
    """
    found = likeness.topk(count, dim=1).indices
    if group is None:
        return found
    group = group.expand_as(likeness)
    own = group.gather(1, found)
    alone = (own == own[:, :1]).all(dim=1)
    others = likeness[alone].masked_fill(group[alone] == own[alone, :1], -torch.inf)
    found[alone, count - count // 2 :] = others.topk(count // 2, dim=1).indices
    return found


def _correlated(
    queries: Tensor, references: Tensor, count: int, positions: Sequence[int], group: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Indices of the references with the largest absolute correlation, and which flip of the query has it.

    Queries have shape ``(Q, H, W)``, references ``(N, H W)``. Where all are of one group, half are those of the largest
    correlation among the other groups.
    """
    indices, flips = _largest(queries, references, count, positions)
    if group is None:
        return indices, flips
    group = group.to(indices.device)
    own = group[indices[:, :1]]
    alone = (group[indices] == own).all(dim=1)
    if alone.any():
        found = _largest(queries[alone], references, count // 2, positions, lambda part: group[part] != own[alone])
        for whole, part in zip((indices, flips), found, strict=True):
            whole[alone, count - count // 2 :] = part
    return indices, flips


def _largest(
    queries: Tensor,
    references: Tensor,
    count: int,
    positions: Sequence[int],
    allowed: Callable[[slice], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    versions = {number: flipped(queries, number).flatten(1) for number in positions}
    device = queries.device
    best = torch.full((len(queries), 0), 0.0, device=device)
    indices = flips = best.long()
    for start in range(0, len(references), CHUNK):
        part = references[start : start + CHUNK]
        likeness = torch.full((len(queries), len(part)), -1.0, device=device)
        version = torch.zeros_like(likeness, dtype=torch.int64)
        for number, rows in versions.items():
            other = (rows @ part.T).abs()
            version = torch.where(other > likeness, number, version)
            likeness = torch.maximum(likeness, other)
        if allowed is not None:
            likeness.masked_fill_(~allowed(slice(start, start + len(part))), -1)
        near, place = likeness.topk(min(count, len(part)), dim=1)
        best = torch.cat([best, near], dim=1)
        indices = torch.cat([indices, place + start], dim=1)
        flips = torch.cat([flips, version.gather(1, place)], dim=1)
        keep = best.topk(min(count, best.shape[1]), dim=1).indices
        best, indices, flips = (values.gather(1, keep) for values in (best, indices, flips))
    return indices, flips


def _judge_flipped(images: Tensor, train: _Greys, indices: Tensor, maps: Tensor, size: tuple[int, int]) -> _Candidates:
    """Correlate grey images with their candidates in double precision, at this size."""
    target = _standardized(images.flatten(1).double())[:, None]
    parts = []
    for columns in _columns(indices, size):
        part = indices[:, columns]
        aligned = _aligned(train.at(size, part.flatten()), maps[:, columns].flatten(0, 1))[0]
        other = _standardized(aligned.flatten(1).double()).view(*part.shape, -1)
        cosine = (target * other).sum(dim=2)
        # 1 - c² of rows that are nearly equal: from their difference, which does not cancel.
        closeness = (target - torch.where(cosine < 0, -1.0, 1.0)[..., None] * other).square().sum(dim=2) / 2
        blank = ~(target.any(dim=2) & other.any(dim=2))
        parts.append(torch.where(blank, 1.0, (closeness * (2 - closeness)).clamp(0, 1).sqrt()).float())
    distances, order = torch.cat(parts, dim=1).sort(dim=1, stable=True)
    return _Candidates(distances, indices.gather(1, order), _gather(maps, order))


def _register(
    images: _Greys, place: slice, train: _Greys, indices: Tensor, device: str, group: Tensor | None
) -> _Candidates:
    """Register images with the candidates that correlate best, each of them once."""
    ordered, order = indices.sort(dim=1, stable=True)
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    coarse = train.at((COARSE, COARSE), ordered.flatten()).view(*ordered.shape, COARSE, COARSE)
    height, width = images.pixels.shape[2:]
    with full_precision(torch.device(device).type), torch.inference_mode():
        queries = images.at((COARSE, COARSE), place).to(device)
        likeness, maps = (part.cpu() for part in correlate_templates(queries, coarse.to(device), aspect=height / width))
        likeness = likeness.amax(dim=2).masked_fill(again, -1)
        count = min(REGISTERED, len(train.pixels), ordered.shape[1])
        best = _most_alike(likeness, count, None if group is None else group[ordered])
        chosen = ordered.gather(1, best)
        maps = maps.gather(1, best[:, :, None, None, None].expand(-1, -1, 2, 2, 3))
        own = torch.arange(place.start, place.stop).repeat_interleave(best.shape[1])
        pairs = [
            (images.at(size, own).to(device), train.at(size, chosen.flatten()).to(device))
            for size in pyramid_sizes(height, width, JUDGED)
        ]
        found = register(pairs, maps.flatten(0, 1).to(device), aspect=height / width)
    # A candidate that stands twice fills up the list only where there are too few others.
    repeated = again.gather(1, best)
    distances = found.distances.cpu().view(best.shape).masked_fill(repeated, 1)
    distances, order = distances.sort(dim=1, stable=True)
    return _Candidates(distances, chosen.gather(1, order), _gather(found.maps.cpu().view(*best.shape, 2, 3), order))


def _nearest(train: _Greys, found: _Candidates, size: tuple[int, int], group: Tensor | None) -> Matches:
    """Take the nearest candidate, and compare it with the next one that shows something else.

    A candidate shows the same as the nearest one if it is of its group, or if the two, both brought into the place of
    the image, differ by less than a third of the root mean square of all candidates' distances *(our choice, as in the
    search for near-duplicates inside the training set)*. Where all do, the next image is taken to be uncorrelated.
    """
    group = torch.arange(len(train.pixels)) if group is None else group
    first, covered = _aligned(train.at(size, found.indices[:, 0]), found.maps[:, 0])
    scale = found.distances.square().mean(dim=1).sqrt()
    parts = []
    for columns in _columns(found.indices, size):
        part = found.indices[:, columns]
        other, mask = _aligned(train.at(size, part.flatten()), found.maps[:, columns].flatten(0, 1))
        shape = *part.shape, -1
        known = covered[:, None].flatten(2) & mask.view(shape)
        apart = _unlikeness(first[:, None].flatten(2), other.view(shape), known)
        parts.append((apart >= scale[:, None] / 3) & (group[part] != group[found.indices[:, :1]]))
    is_other = F.pad(torch.cat(parts, dim=1), (0, 1), value=True)
    following = F.pad(found.distances, (0, 1), value=1.0).gather(1, is_other.int().argmax(dim=1, keepdim=True))[:, 0]
    nearest = found.distances[:, 0]
    ratios = torch.where(following > 0, nearest / following.clamp(min=1e-12), 0).clamp(max=1)
    return Matches(nearest, ratios, found.indices[:, 0].clone(), found.maps[:, 0].clone())


def _aligned(greys: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Grey training images in the place of the images, and where they are known, shape ``(B, H, W)`` each."""
    different, number = maps.unique(dim=0, return_inverse=True)  # of flips there are 8
    grid = F.affine_grid(different, [len(different), *greys.shape[1:]], align_corners=False)
    known = grid.abs() <= 1 + 1e-4
    known = known[..., 0] & known[..., 1]  # `all` takes three times as long
    warped = F.grid_sample(greys, grid[number], padding_mode="border", align_corners=False)
    return warped[:, 0], known[number]


def _unlikeness(one: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    weights = (mask[:1, :1] if mask.all() else mask).double()
    size = weights.sum(dim=-1, keepdim=True).clamp(min=1)
    one, other = ((part - (part * weights).sum(dim=-1, keepdim=True) / size) * weights for part in (one, other))
    norms = torch.linalg.vector_norm(one, dim=-1) * torch.linalg.vector_norm(other, dim=-1)
    correlation = (one * other).sum(dim=-1) / norms.clamp(min=1e-12)
    return (1 - correlation.square()).clamp(0, 1).sqrt().float()


def _columns(indices: Tensor, size: tuple[int, int]) -> list[slice]:
    """Cut the columns of candidates into parts that may be worked on together."""
    width = max(1, _PIXELS // max(1, len(indices) * size[0] * size[1]))
    return [slice(start, start + width) for start in range(0, indices.shape[1], width)]


def _gather(maps: Tensor, order: Tensor) -> Tensor:
    return maps.gather(1, order[:, :, None, None].expand(-1, -1, 2, 3))


def _spectrum(grey: Tensor) -> Tensor:
    """Amplitudes of the Fourier transform of an image and its mirror image together, which shifts do not change."""
    grey = grey[:, 0]
    grey = grey - grey.mean(dim=(1, 2), keepdim=True)
    windows = [torch.hann_window(n + 2, periodic=False, device=grey.device)[1:-1] for n in grey.shape[1:]]
    amplitudes = torch.fft.rfft2(grey * (windows[0][:, None] * windows[1]).sqrt()).abs().sqrt()
    amplitudes = amplitudes + amplitudes.flip(1).roll(1, dims=1)
    smooth = F.avg_pool2d(amplitudes[:, None], 3, 1, 1).flatten(1)
    return smooth - smooth.mean(dim=1, keepdim=True)


def _thumbnail(grey: Tensor) -> Tensor:
    rows = F.adaptive_avg_pool2d(grey, 8).flatten(1)
    return rows - rows.mean(dim=1, keepdim=True)
