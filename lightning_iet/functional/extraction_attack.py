"""Extraction of training images by looking for images that a generator emits again and again."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_iet.functional.cliques import check_min_size, disjoint_cliques
from lightning_iet.functional.exhaustive_neighbors import float_slices
from lightning_iet.functional.images import image_rows
from lightning_iet.functional.near_duplicates import check_tiles, near_duplicates, tiled_distances

__all__ = ["Clique", "extraction_attack", "near_duplicates", "tiled_distances"]


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

    10 of 500 are for one caption. Among images of a model without captions, or of all captions together, a copy has to
    be that much more frequent to be found; draw more of them, or pass a smaller ``min_size``.

    One distance and one ``eps`` serve for both questions, which images are alike and which training image they show
    *(our choice: the paper holds the plain root mean square over the whole image against 0.15 to call a training image
    extracted; that of the worst tile is never less, so ours calls fewer so)*.

    Equal images are merged first, and the order in which images are looked at depends on what they show, so the order
    in which they come does not matter.

    Args:
        generated: shape ``(Q, C, H, W)``, uint8 or floating point in [0, 1].
        train: shape ``(N, C, H, W)``, likewise.
        eps: the largest distance of near duplicates, in (0, 1]. Small or dull images need less than 0.15 *(our choice;
            see what held-out images give)*.
        min_size: the smallest clique.
        grid: tiles along each side; 4 as published, 16 tiles in all.

    Returns:
        The cliques, the largest first.

    Raises:
        TypeError: as :func:`near_duplicates`.
        ValueError: as :func:`near_duplicates` and :func:`~lightning_iet.functional.cliques.disjoint_cliques`, for which
            equal generated images count as one.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> train, generated = torch.rand(2, 30, 1, 8, 8, generator=draw)
        >>> generated[[3, 5, 8]] = train[7]
        >>> extraction_attack(generated, train, min_size=3)
        [Clique(members=tensor([3, 5, 8]), train=tensor([7]))]
    """
    check_tiles(generated, train, eps=eps, grid=grid)
    check_min_size(min_size)
    equal = _equal_images(image_rows(generated, name="generated"))
    sizes = torch.tensor([len(group) for group in equal], dtype=torch.int64)
    different = torch.tensor([group[0] for group in equal], dtype=torch.int64, device=generated.device)
    pairs = near_duplicates(generated[different], eps=eps, grid=grid)
    groups = disjoint_cliques(pairs, min_size=min_size, sizes=sizes)
    shown = _shown_images(generated, [different[group] for group in groups], train, eps=eps, grid=grid)
    members = [sorted(index for node in group.tolist() for index in equal[node]) for group in groups]
    cliques = [Clique(torch.tensor(m, device=generated.device), t) for m, t in zip(members, shown, strict=True)]
    return sorted(cliques, key=lambda clique: (-len(clique.members), clique.members.tolist()))


def _equal_images(rows: Tensor) -> list[list[int]]:
    """Return groups of indices of equal images, in an order that depends on what the images show, and on nothing else.

    The order is that of the hashes of their values in float32, the same for uint8 and floating point.
    """
    groups: dict[bytes, list[int]] = {}
    index = 0
    for part in float_slices(rows):
        for row in part.cpu().numpy() + 0.0:  # -0.0 is 0.0
            groups.setdefault(hashlib.sha256(row).digest(), []).append(index)
            index += 1
    return [groups[digest] for digest in sorted(groups)]


def _shown_images(generated: Tensor, groups: list[Tensor], train: Tensor, *, eps: float, grid: int) -> list[Tensor]:
    """Return the near duplicates of each group among the training images, in one pass over these."""
    if not groups:
        return []
    owners = torch.arange(len(groups), device=generated.device).repeat_interleave(
        torch.tensor([len(group) for group in groups], device=generated.device)
    )
    pairs = near_duplicates(generated[torch.cat(groups)], train, eps=eps, grid=grid)
    return [pairs[owners[pairs[:, 0]] == group, 1].unique() for group in range(len(groups))]
