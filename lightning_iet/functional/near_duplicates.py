"""Near duplicates among images: all pairs that differ little in every part of the image."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_iet.functional.checks import check_number
from lightning_iet.functional.exhaustive_neighbors import float_rows, rounding, squared_norms
from lightning_iet.functional.images import image_rows
from lightning_iet.functional.precision import full_precision

__all__ = ["check_tiles", "near_duplicates", "tiled_distances"]

_FLOATS = 2**24  # values (64 MiB) that are held at a time
_SIDE = 4096  # images on each side of a block of pairs, at most
_DEPTH = 2048  # values of an image that go into one matrix product
_PAIRS = 10_000_000


def check_tiles(images: Tensor, others: Tensor, *, eps: float, grid: int) -> None:
    """Refuse images that cannot be compared tile by tile, and settings that no pair can meet.

    Args:
        images: shape ``(Q, C, H, W)``.
        others: shape ``(N, C, H, W)``.
        eps: the largest distance of near duplicates.
        grid: tiles along each side.

    Raises:
        ValueError: if the shapes differ, ``eps`` is not in (0, 1], or ``grid`` larger than the shorter side.

    Example:
        >>> check_tiles(torch.zeros(2, 1, 8, 8), torch.zeros(3, 1, 8, 8), eps=0.1, grid=4)
    """
    if images.ndim != 4 or images.shape[1:] != others.shape[1:]:
        raise ValueError(
            f"Argument `images` expected shape (N, C, H, W), and images of one size, but got {tuple(images.shape)} and "
            f"{tuple(others.shape)}. Resize or convert them first."
        )
    check_number("eps", eps, "(0, 1]", "0.15 is the default.")
    _check_grid(grid, min(images.shape[2:]))


def _check_grid(grid: int, side: int) -> None:
    if not 1 <= grid <= side:
        raise ValueError(
            f"Argument `grid` expected a number from 1 to the images' shorter side, {side}, but got {grid}. "
            "Pass a smaller `grid`."
        )


def tiled_distances(images: Tensor, others: Tensor, *, grid: int = 4) -> Tensor:
    r"""Return the distance in that tile in which two images differ most.

    .. math:: d(x, y) = \max_{t} \sqrt{\frac{1}{|t|} \sum_{p \in t} (x_p - y_p)^2}

    over the tiles :math:`t` of a grid over the image, all channels of a pixel in one tile. A plain l2 distance would
    call two different small things before one large white background near duplicates.

    Sides that ``grid`` does not divide get tiles whose sides differ by one pixel *(our choice)*.

    Args:
        images: shape ``(P, C, H, W)``, uint8 or floating point in [0, 1].
        others: the same shape; image ``i`` is compared with image ``i``.
        grid: tiles along each side.

    Returns:
        Shape ``(P,)``, in [0, 1], float32.

    Raises:
        ValueError: if ``grid`` is out of range.

    Example:
        >>> image = torch.zeros(1, 1, 8, 8)
        >>> other = image.clone()
        >>> other[0, 0, 0, 0] = 1  # one of the four pixels of a tile
        >>> tiled_distances(image, other)
        tensor([0.5000])
    """
    squares = (float_rows(images) - float_rows(others)).square().mean(dim=1).flatten(1)
    # Summed in float64: in float32 the sum over a tile of 128x128 equal squares may be off by thousands of roundings.
    weights = _tile_weights(images.shape[2], images.shape[3], grid).to(images.device)
    return (squares.double() @ weights).amax(dim=1).sqrt().float()


def _tile_weights(height: int, width: int, grid: int) -> Tensor:
    """A matrix that averages over tiles, shape (H * W, grid * grid)."""
    _check_grid(grid, min(height, width))
    row, column = (torch.arange(side) * grid // side for side in (height, width))
    tiles = torch.nn.functional.one_hot((row[:, None] * grid + column).flatten(), grid * grid).double()
    return tiles / tiles.sum(dim=0)


def near_duplicates(images: Tensor, others: Tensor | None = None, *, eps: float = 0.15, grid: int = 4) -> Tensor:
    """Find all pairs of images whose :func:`tiled_distances` is at most ``eps``.

    The mean square over the whole image is at most that over the worst tile, so a matrix product finds all candidates.

    Args:
        images: shape ``(Q, C, H, W)``, uint8 or floating point in [0, 1].
        others: shape ``(N, C, H, W)``, likewise; by default pairs are sought among ``images``, each once.
        eps: the largest distance of near duplicates.
        grid: tiles along each side.

    Returns:
        int64, shape ``(P, 2)``, an index into ``images`` and into ``others``, in ascending order.

    Raises:
        TypeError: as :func:`~lightning_iet.functional.images.image_rows`.
        ValueError: as :func:`~lightning_iet.functional.images.image_rows` and :func:`check_tiles`; if there are more
            than 10 million pairs.

    Example:
        >>> near_duplicates(torch.tensor([0.0, 0.1, 0.5, 0.55]).reshape(4, 1, 1, 1).expand(4, 1, 4, 4), eps=0.12)
        tensor([[0, 1],
                [2, 3]])
    """
    targets = images if others is None else others
    check_tiles(images, targets, eps=eps, grid=grid)
    rows, others_rows = image_rows(images), None if others is None else image_rows(others, name="others")
    found, total = [torch.zeros(0, 2, dtype=torch.int64, device=images.device)], 0
    for candidates in _candidates(rows, others_rows, eps):
        for pairs in candidates.split(max(1, _FLOATS // images[0].numel())):
            distances = tiled_distances(images[pairs[:, 0]], targets[pairs[:, 1]], grid=grid)
            found.append(pairs[distances <= eps])
            total += len(found[-1])
        if total > _PAIRS:
            raise ValueError(
                f"Argument `eps` expected a distance that few images lie within, but got {eps}, with more than "
                f"{_PAIRS:,} pairs of near duplicates. Pass every image once only, and a smaller `eps`."
            )
    pairs = torch.cat(found)
    return pairs[(pairs[:, 0] * len(targets) + pairs[:, 1]).argsort()]


def _candidates(rows: Tensor, others: Tensor | None, eps: float) -> Iterator[Tensor]:
    """Yield index pairs that include all whose root mean square difference is at most ``eps``.

    A block of rows against a block of others at a time; within one set, each pair of blocks once.
    """
    dimension = max(1, rows.shape[1])
    side = max(1, min(_SIDE, _FLOATS // dimension))
    limit = eps**2 * dimension * (1 + 1e-6)  # what tiled_distances may round down to eps
    for start, left in _blocks(rows, side):
        # No image within the limit is longer than the one that it is compared with, plus the distance.
        error = rounding(2 * squared_norms(left).sqrt() + limit**0.5, dimension, depth=_DEPTH)[:, None]
        for other_start, right in _blocks(rows, side, first=start) if others is None else _blocks(others, side):
            near = _squared_distances(left, right) <= limit + error
            if others is None and other_start == start:
                near = near.triu(diagonal=1)
            yield near.nonzero() + torch.tensor([start, other_start], device=rows.device)


def _blocks(rows: Tensor, side: int, *, first: int = 0) -> Iterator[tuple[int, Tensor]]:
    for start in range(first, len(rows), side):
        yield start, float_rows(rows[start : start + side])


def _squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """Estimate squared distances by a sum of matrix products no deeper than ``_DEPTH``, which bounds the rounding."""
    parts = max(1, -(-left.shape[1] // _DEPTH))
    distances = squared_norms(left)[:, None] + squared_norms(right)
    with full_precision(left.device.type):
        for x, y in zip(left.tensor_split(parts, dim=1), right.tensor_split(parts, dim=1), strict=True):
            distances.addmm_(x, y.T, alpha=-2)
    return distances
