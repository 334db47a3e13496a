"""Near-duplicates inside a set of images: a known cause of memorization, and a trap for its measures."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_iet.functional.checks import check_at_least, check_number
from lightning_iet.functional.neighbors import nearest_neighbors, search_rows

WIDER = 8  # by how much lists of neighbours grow that end within a group
LISTED = 2**22  # neighbours that are listed at once: of fewer queries, the longer their lists are


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Groups of training images that show the same thing.

    Attributes:
        group: for each of the ``N`` training images the number of its group, shape ``(N,)``; most are alone in theirs.
        members: the groups of more than one, largest first, each as sorted positions.
        features: what they were found by, ``"pixels"`` or the name of a network.
    """

    group: Tensor
    members: list[list[int]]
    features: str = "pixels"

    @property
    def images(self) -> int:
        """Number of training images with at least one near-duplicate."""
        return sum(map(len, self.members))

    @property
    def largest(self) -> int:
        """Number of images in the largest group; 1 where nothing is duplicated."""
        return len(self.members[0]) if self.members else 1


def duplicate_groups(images: Tensor, *, k: int = 50, ratio: float = 1 / 3) -> Duplicates:
    """Find near-duplicates by pixels, as :func:`find_duplicates` does.

    Args:
        images: shape ``(N, ...)``, uint8 or floating point in [0, 1].
        k: images around an image that say what is near there; ``N - 1`` where there are fewer.
        ratio: the threshold ``ρ``, in (0, 1].

    Raises:
        TypeError: as :func:`~lightning_iet.functional.neighbors.nearest_neighbors`.
        ValueError: as that; if ``k`` or ``ratio`` is out of range.

    Example:
        >>> images = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> images[90:] = 0.98 * images[7]
        >>> duplicate_groups(images).members
        [[7, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99]]
    """
    check_at_least(1, k=k)
    check_number("ratio", ratio, "(0, 1]", "The usual one is 1/3.")
    if len(images) < 3:  # nothing around two images says what is near
        return _connected(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), len(images), "pixels")
    sq_distances, indices = nearest_neighbors(images, images, min(k, len(images) - 1) + 1)
    return find_duplicates(*without_self(sq_distances.cpu(), indices.cpu()), ratio=ratio)


def find_duplicates(
    sq_distances: Tensor, indices: Tensor, *, ratio: float = 1 / 3, features: str = "pixels"
) -> Duplicates:
    r"""Group images that are far closer to one another than to the images around them.

    Image ``j`` is a near-duplicate of ``i`` if

    .. math:: d_{ij} < \rho \sqrt{\tfrac{1}{k} \sum_{l=1}^{k} d_{il}^2}

    over the ``k`` nearest others of ``i``, and a group holds what such pairs connect. *(our choice: the distance to the
    second nearest would hide an image that stands there three times; the mean over 50 does not.)* Where a quarter of
    the ``k`` are near-duplicates, that mean is one over duplicates and would hide them in turn: there the median of all
    images' means takes its place, in which an image that occurs m times counts once, as 1/m each *(our choice)*.

    Args:
        sq_distances: to the ``k`` nearest others of each of ``N`` images, shape ``(N, k)``.
        indices: their positions, shape ``(N, k)``.
        ratio: the threshold ``ρ``.
        features: what the distances were measured in, to put on record.

    Example:
        >>> sq_distances = torch.tensor([[0.0, 9.0], [0.0, 9.0], [9.0, 9.0]])
        >>> find_duplicates(sq_distances, torch.tensor([[1, 2], [0, 2], [0, 1]])).members
        [[0, 1]]
    """
    scale = sq_distances.mean(dim=1)
    usual = _usual(scale, sq_distances, ratio)
    crowded = sq_distances[:, sq_distances.shape[1] // 4] < ratio**2 * usual
    scale = torch.where(crowded, torch.maximum(scale, usual), scale)[:, None]
    rows, columns = ((sq_distances < ratio**2 * scale) | (sq_distances == 0)).nonzero(as_tuple=True)
    return _connected(rows, indices[rows, columns], len(indices), features)


def _usual(scale: Tensor, sq_distances: Tensor, ratio: float) -> Tensor:
    """The median of the images' mean squared distances, an image that occurs m times weighing 1/m each."""
    near = sq_distances < ratio**2 * scale.quantile(0.9)
    order = scale.argsort()
    weights = (1 / (1 + near.sum(dim=1).double()))[order].cumsum(0)
    return scale[order[torch.searchsorted(weights, weights[-1] / 2)]]


def without_self(sq_distances: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Take every image out of its own list of neighbours.

    Args:
        sq_distances: to the ``k`` nearest of each image of a set, searched for in that same set, shape ``(N, k)``.
        indices: their positions, shape ``(N, k)``.

    Returns:
        Squared distances and indices of the ``k - 1`` nearest others, shape ``(N, k - 1)``.
    """
    found = indices == torch.arange(len(indices))[:, None]
    # With k identical images before it, an image is missing from its own list: then the last of them goes.
    found[:, -1] |= ~found.any(dim=1)
    shape = len(found), indices.shape[1] - 1
    return sq_distances[~found].view(shape), indices[~found].view(shape)


@torch.no_grad()
def nearest_of_two_groups(
    queries: Tensor,
    references: Tensor,
    groups: Tensor,
    *,
    norms: Tensor | None = None,
    squares: Tensor | None = None,
    found: tuple[Tensor, Tensor] | None = None,
    width: int = 2,
) -> tuple[Tensor, Tensor]:
    """Find the nearest reference of every query, and the nearest of the references in other groups than its own.

    Lists of neighbours grow until they end outside of the group; the longer they are, the fewer there are at once.

    Args:
        queries: shape ``(Q, D)``, uint8 or floating point in [0, 1].
        references: shape ``(N, D)``, likewise.
        groups: number of the group of each reference, as :class:`Duplicates` has it, shape ``(N,)``.
        norms: the squared norms of the references, shape ``(N,)``, if at hand.
        squares: likewise those of their levels, see :func:`~lightning_iet.functional.neighbors.search_rows`.
        found: squared distances and indices of the nearest references, shape ``(Q, k)`` with ``k >= 2``, if at hand;
            only queries whose ``k`` neighbours are of one group are searched again.
        width: neighbours that are searched for first, at least 2, where none are at hand.

    Returns:
        Squared distances, float32, and indices, int64, shape ``(Q, 2)`` each.

    Raises:
        ValueError: if all references are of one group.

    Example:
        >>> references = torch.tensor([[0.0], [0.1], [0.5]])
        >>> nearest_of_two_groups(torch.tensor([[0.0]]), references, torch.tensor([0, 0, 1]))
        (tensor([[0.0000, 0.2500]]), tensor([[0, 2]]))
    """
    if len(groups) == 0 or (groups == groups[0]).all():
        raise ValueError(
            f"Argument `groups` expected images of at least two groups, but all {len(groups)} are near-duplicates of "
            "one another. Add different images, or count every image for itself (duplicates='keep')."
        )
    widest = int(groups.bincount().max()) + 1  # so many neighbours are never of one group
    pairs = torch.full((len(queries), 2), torch.inf, device=queries.device)
    places = torch.full_like(pairs, -1, dtype=torch.int64)
    left = torch.arange(len(queries), device=queries.device)
    if found is not None:
        pairs, places, is_open = _first_of_two(*found, groups)
        left, width = left[is_open], WIDER * found[1].shape[1]
    while len(left):
        width, still = min(width, widest), []
        for part in left.split(max(1, LISTED // width)):
            near = search_rows(queries[part], references, width, norms=norms, squares=squares)
            pairs[part], places[part], is_open = _first_of_two(*near, groups)
            still.append(part[is_open])
        left, width = torch.cat(still), WIDER * width
    return pairs, places


def _first_of_two(distances: Tensor, indices: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take from lists the nearest and the first of another group, and tell which lists hold none of another group."""
    members = groups[indices]
    second = (members != members[:, :1]).int().argmax(dim=1, keepdim=True)  # the first that differs, or 0
    chosen = torch.cat([torch.zeros_like(second), second], dim=1)
    return distances.gather(1, chosen), indices.gather(1, chosen), second[:, 0] == 0


def _connected(rows: Tensor, columns: Tensor, number: int, features: str) -> Duplicates:
    """The groups that pairs connect."""
    from scipy.sparse import coo_array  # here, so that functions without it need torch alone
    from scipy.sparse.csgraph import connected_components

    edges = (np.ones(len(rows), dtype=bool), (rows.numpy(), columns.numpy()))
    _, labels = connected_components(coo_array(edges, shape=(number, number)), directed=False)
    counts = np.bincount(labels, minlength=1)
    members: dict[int, list[int]] = {}
    for index in np.flatnonzero(counts[labels] > 1).tolist():
        members.setdefault(int(labels[index]), []).append(index)
    groups = sorted(members.values(), key=lambda group: (-len(group), group))
    return Duplicates(torch.from_numpy(labels.astype(np.int64)), groups, features)
