"""Near-duplicates inside the training set: a known cause of memorization, and a trap for its measures."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lightning_iet.audit.search import Neighbors

__all__ = ["Duplicates", "find_duplicates", "without_self"]


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


def without_self(neighbors: Neighbors) -> tuple[Tensor, Tensor]:
    """Take every image out of its own list of neighbours.

    Args:
        neighbors: the ``k`` nearest of each image of a set, searched for in that same set.

    Returns:
        Squared distances and indices of the ``k - 1`` nearest others, shape ``(N, k - 1)``.
    """
    itself = neighbors.indices == torch.arange(len(neighbors.indices))[:, None]
    # With k identical images before it, an image is missing from its own list: then the last of them goes.
    itself[:, -1] |= ~itself.any(dim=1)
    shape = len(itself), -1
    return neighbors.sq_distances[~itself].view(shape), neighbors.indices[~itself].view(shape)


def find_duplicates(
    sq_distances: Tensor, indices: Tensor, *, ratio: float = 1 / 3, features: str = "pixels"
) -> Duplicates:
    r"""Group images that are far closer to one another than to the images around them.

    Image ``j`` is a near-duplicate of ``i`` if

    .. math:: d_{ij} < \rho \sqrt{\tfrac{1}{k} \sum_{l=1}^{k} d_{il}^2}

    over the ``k`` nearest others of ``i``, and a group holds what such pairs connect. *(our choice: the distance to the
    second nearest would hide an image that stands there three times; the mean over 50 does not.)*

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
    scale = sq_distances.mean(dim=1, keepdim=True)
    rows, columns = ((sq_distances < ratio**2 * scale) | (sq_distances == 0)).nonzero(as_tuple=True)
    total = len(indices)
    edges = (np.ones(len(rows), dtype=bool), (rows.numpy(), indices[rows, columns].numpy()))
    _, labels = connected_components(coo_array(edges, shape=(total, total)), directed=False)
    return Duplicates(torch.from_numpy(labels.astype(np.int64)), _members(labels), features)


def _members(labels: np.ndarray) -> list[list[int]]:
    counts = np.bincount(labels)
    members: dict[int, list[int]] = {}
    for index in np.flatnonzero(counts[labels] > 1).tolist():
        members.setdefault(int(labels[index]), []).append(index)
    return sorted(members.values(), key=lambda group: (-len(group), group))
