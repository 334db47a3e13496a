"""Near-duplicates inside a set of images: a known cause of memorization, and a trap for its measures."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lightning_iet.functional.memorization import nearest_ratio
from lightning_iet.functional.neighbors import nearest_neighbors


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

    Returns:
        The groups.

    Raises:
        TypeError: as :func:`~lightning_iet.functional.neighbors.nearest_neighbors`.
        ValueError: as that; if ``k`` or ``ratio`` is out of range.

    Example:
        >>> images = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> images[90:] = 0.98 * images[7]
        >>> duplicate_groups(images).members
        [[7, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99]]
    """
    if k < 1:
        raise ValueError(f"Argument `k` expected an integer ≥ 1, but got {k}.")
    if not 0 < ratio <= 1:
        raise ValueError(f"Argument `ratio` expected a number in (0, 1], but got {ratio}. The usual one is 1/3.")
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

    Returns:
        The groups.

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


def without_self(sq_distances: Tensor, indices: Tensor, *, itself: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Take every image out of its own list of neighbours.

    Args:
        sq_distances: to the ``k`` nearest of each image of a set, searched for in that same set, shape ``(N, k)``.
        indices: their positions, shape ``(N, k)``.
        itself: position of each image in the set, shape ``(N,)``; ``None`` = ``0 … N - 1``.

    Returns:
        Squared distances and indices of the ``k - 1`` nearest others, shape ``(N, k - 1)``.
    """
    own = torch.arange(len(indices)) if itself is None else itself
    found = indices == own[:, None]
    # With k identical images before it, an image is missing from its own list: then the last of them goes.
    found[:, -1] |= ~found.any(dim=1)
    shape = len(found), indices.shape[1] - 1
    return sq_distances[~found].view(shape), indices[~found].view(shape)


def distinct_ratio(sq_distances: Tensor, indices: Tensor, group: Tensor) -> Tensor:
    """Compare the nearest training image with the nearest one that shows something else.

    ``d1 / d2`` as published, with near-duplicates in the training set counted as one image *(our choice: a copy of an
    image that stands twice in the training set is as near to both, so that d1 / d2 is 1, although copies are made of
    just these)*. Without near-duplicates it is the published ratio.

    Args:
        sq_distances: to the ``k`` nearest training images of ``Q`` images, shape ``(Q, k)``, ascending.
        indices: their positions, shape ``(Q, k)``.
        group: number of the group of each training image, shape ``(N,)``.

    Returns:
        Shape ``(Q,)``. Where all neighbours show the same thing, the last of them stands for the others: look at more
        neighbours than the largest group has images.

    Example:
        >>> sq_distances, indices = torch.tensor([[1.0, 1.0, 16.0]]), torch.tensor([[0, 1, 2]])
        >>> distinct_ratio(sq_distances, indices, torch.tensor([7, 7, 8])), nearest_ratio(sq_distances)
        (tensor([0.2500]), tensor([1.]))
    """
    groups = group[indices]
    other = groups != groups[:, :1]
    other[:, -1] = True
    second = other.int().argmax(dim=1, keepdim=True)  # the first that is true
    return nearest_ratio(torch.cat([sq_distances[:, :1], sq_distances.gather(1, second)], dim=1))


def _connected(rows: Tensor, columns: Tensor, number: int, features: str) -> Duplicates:
    """The groups that pairs connect."""
    edges = (np.ones(len(rows), dtype=bool), (rows.numpy(), columns.numpy()))
    _, labels = connected_components(coo_array(edges, shape=(number, number)), directed=False)
    counts = np.bincount(labels, minlength=1)
    members: dict[int, list[int]] = {}
    for index in np.flatnonzero(counts[labels] > 1).tolist():
        members.setdefault(int(labels[index]), []).append(index)
    groups = sorted(members.values(), key=lambda group: (-len(group), group))
    return Duplicates(torch.from_numpy(labels.astype(np.int64)), groups, features)
