"""Extraction of training images by looking for images that a generator emits again and again."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_iet.functional.cliques import disjoint_cliques
from lightning_iet.functional.images import image_rows, unit_interval
from lightning_iet.functional.precision import full_precision

__all__ = ["Clique", "extraction_attack", "near_duplicates", "tiled_distances"]

_FLOATS = 2**24  # values (64 MiB) that are held at a time
_ROUNDING = 1e-5  # of float32 matrix products, relative to the norms; more than they have
_PAIRS = 10_000_000


class Clique(NamedTuple):
    """Generated images that are near duplicates of one another, and the training images that they duplicate.

    Attributes:
        members: indices of the generated images, ascending.
        train: indices of the training images that are near duplicates of a member, ascending; empty if there are none.
    """

    members: Tensor
    train: Tensor


def extraction_attack(
    generated: Tensor, train: Tensor, *, eps: float = 0.15, min_size: int = 10, grid: int = 4
) -> list[Clique]:
    """Find groups of generated images that are all near duplicates of one another, and look for their originals.

    A model that has learnt an image by heart emits it time and again, whereas images that it makes up are all
    different. So an attacker who only sees the output can tell what is memorised: draw an edge between any two images
    whose :func:`tiled_distances` is at most ``eps``, and take the cliques of at least ``min_size`` images (Carlini et
    al., *Extracting Training Data from Diffusion Models*, USENIX Security 2023, arXiv:2301.13188: 500 images for each
    of many captions, cliques of at least 10). That the attack was right is then checked against the training images.

    Args:
        generated: shape ``(Q, C, H, W)``, uint8 or floating point in [0, 1].
        train: shape ``(N, C, H, W)``, likewise.
        eps: the largest distance of near duplicates. 0.15 is the distance at which the paper calls a training image of
            512x512 extracted; small or dull images need less *(our choice; see what held-out images give)*.
        min_size: the smallest clique.
        grid: tiles along each side; 4 as published, 16 tiles in all.

    Returns:
        The cliques, the largest first.

    Raises:
        TypeError: as :func:`near_duplicates`.
        ValueError: as :func:`near_duplicates` and :func:`~lightning_iet.functional.cliques.disjoint_cliques`.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> train, generated = torch.rand(2, 30, 1, 8, 8, generator=draw)
        >>> generated[[3, 5, 8]] = train[7]
        >>> extraction_attack(generated, train, min_size=3)
        [Clique(members=tensor([3, 5, 8]), train=tensor([7]))]
    """
    groups = disjoint_cliques(near_duplicates(generated, eps=eps, grid=grid), min_size=min_size)
    return [
        Clique(members, near_duplicates(generated[members], train, eps=eps, grid=grid)[:, 1].unique())
        for members in groups
    ]


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
        Shape ``(P,)``, in [0, 1].

    Example:
        >>> image = torch.zeros(1, 1, 8, 8)
        >>> other = image.clone()
        >>> other[0, 0, 0, 0] = 1  # one of the four pixels of a tile
        >>> tiled_distances(image, other)
        tensor([0.5000])
    """
    squares = (unit_interval(images) - unit_interval(others)).square().mean(dim=1).flatten(1)
    with full_precision(images.device.type):
        return (squares @ _tile_weights(images.shape[2], images.shape[3], grid).to(squares)).amax(dim=1).sqrt()


def _tile_weights(height: int, width: int, grid: int) -> Tensor:
    """A matrix that averages over tiles, shape (H * W, grid * grid)."""
    if not 1 <= grid <= min(height, width):
        raise ValueError(
            f"Argument `grid` expected a number from 1 to the images' shorter side, {min(height, width)}, "
            f"but got {grid}. Pass a smaller `grid`."
        )
    row, column = (torch.arange(side) * grid // side for side in (height, width))
    tiles = torch.nn.functional.one_hot((row[:, None] * grid + column).flatten(), grid * grid).float()
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
        int64, shape ``(P, 2)``: index into ``images`` and into ``others``, in ascending order.

    Raises:
        TypeError: as :func:`~lightning_iet.functional.images.image_rows`.
        ValueError: as :func:`~lightning_iet.functional.images.image_rows`; if the images differ in shape, or there are
            more than 10 million pairs.

    Example:
        >>> near_duplicates(torch.tensor([0.0, 0.1, 0.5, 0.55]).reshape(4, 1, 1, 1).expand(4, 1, 4, 4), eps=0.12)
        tensor([[0, 1],
                [2, 3]])
    """
    targets = images if others is None else others
    if images.ndim != 4 or images.shape[1:] != targets.shape[1:]:
        raise ValueError(
            f"Argument `images` expected shape (N, C, H, W), and images of one size, but got {tuple(images.shape)} and "
            f"{tuple(targets.shape)}. Resize or convert them first."
        )
    found, total = [torch.zeros(0, 2, dtype=torch.int64, device=images.device)], 0
    for candidates in _candidates(image_rows(images), image_rows(targets), eps, within=others is None):
        for pairs in candidates.split(max(1, _FLOATS // images[0].numel())):
            distances = tiled_distances(images[pairs[:, 0]], targets[pairs[:, 1]], grid=grid)
            found.append(pairs[distances <= eps])
            total += len(found[-1])
        if total > _PAIRS:
            raise ValueError(
                f"Argument `eps` expected a distance that few images lie within, but got {eps}, with more than "
                f"{_PAIRS:,} pairs of near duplicates. Pass a smaller `eps` or fewer images."
            )
    return torch.cat(found)


def _candidates(rows: Tensor, others: Tensor, eps: float, *, within: bool) -> Iterator[Tensor]:
    """Yield index pairs that include all whose root mean square difference is at most ``eps``."""
    limit = eps**2 * rows.shape[1]
    step = max(1, _FLOATS // max(len(others), rows.shape[1]))
    norms = torch.cat([unit_interval(part).square().sum(dim=1) for part in others.split(step)])
    for start in range(0, len(rows), step):
        left = unit_interval(rows[start : start + step])
        scale = left.square().sum(dim=1)[:, None] + norms
        with full_precision(rows.device.type):
            products = torch.cat([left @ unit_interval(part).T for part in others.split(step)], dim=1)
        near = scale - 2 * products <= limit + _ROUNDING * scale
        if within:
            near = near.triu(diagonal=start + 1)
        yield near.nonzero() + torch.tensor([start, 0], device=rows.device)
