"""Cliques of a graph of near duplicates."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

__all__ = ["check_min_size", "disjoint_cliques"]

_EXACT = 400  # nodes of a tangle up to which its largest clique is searched for; Python's stack holds no more
_STEPS = 4_000_000  # nodes looked at in all searches of a call together; some seconds

Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def disjoint_cliques(pairs: Tensor, *, min_size: int = 10, sizes: Tensor | None = None) -> list[Tensor]:
    """Take the largest clique out of a graph, again and again, while it has ``min_size`` images.

    Where groups of near duplicates stand apart, these are the groups. Where cliques overlap, every image goes to the
    largest that it is in *(our choice, so that images are counted once)*. Which of equally large ones is taken depends
    on the numbering of the nodes, and so may the number of cliques: who numbers the nodes by what they show, and not by
    when they came, gets the same cliques in any order.

    To find the largest clique is NP-hard. In tangles of more than 400 nodes, some pairs of which are near duplicates
    and some not, and in all that are left when 4 million nodes have been looked at, cliques are therefore grown
    greedily *(our choice)*: all are cliques, but larger ones may exist.

    Args:
        pairs: the edges, each once, shape ``(P, 2)``.
        min_size: the smallest clique, at least 2.
        sizes: how many equal images each node stands for, shape ``(V,)``; by default one. A node may be a clique alone.

    Returns:
        The nodes of each clique, ascending; the clique of most images first.

    Raises:
        ValueError: if ``min_size`` is less than 2.

    Example:
        >>> disjoint_cliques(torch.tensor([[0, 1], [0, 2], [1, 2], [2, 3], [7, 8]]), min_size=2)
        [tensor([0, 1, 2]), tensor([7, 8])]
        >>> disjoint_cliques(torch.tensor([[0, 1]]), min_size=3, sizes=torch.tensor([2, 1, 5]))
        [tensor([2]), tensor([0, 1])]
    """
    check_min_size(min_size)
    if sizes is None:
        sizes = torch.ones(int(pairs.max()) + 1 if len(pairs) else 0, dtype=torch.int64)
    if sizes.sum() < min_size:
        return []
    weights = sizes.cpu().numpy()
    found, steps = [], _STEPS
    for nodes, graph in _components(_adjacency(pairs, len(weights)), weights, min_size):
        left = np.ones(len(nodes), dtype=bool)
        if len(nodes) <= _EXACT:
            search = _Search(graph, weights[nodes], steps)
            found += [np.sort(nodes[clique]) for clique in search.cliques(left, min_size)]
            steps = search.steps
        found += [np.sort(nodes[clique]) for clique in _grown_cliques(graph, weights[nodes], left, min_size)]
    ordered = sorted(found, key=lambda clique: (-weights[clique].sum(), clique.tolist()))
    return [torch.from_numpy(clique).to(pairs.device) for clique in ordered]


def check_min_size(min_size: int) -> None:
    """Refuse cliques of a single image.

    Args:
        min_size: the smallest clique.

    Raises:
        ValueError: if it is less than 2.

    Example:
        >>> check_min_size(10)
    """
    if min_size < 2:
        raise ValueError(f"Argument `min_size` expected at least 2, but got {min_size}. The published one is 10.")


def _adjacency(pairs: Tensor, num_nodes: int) -> csr_array:
    first, second = pairs.cpu().numpy().T
    places = np.concatenate([first, second]), np.concatenate([second, first])
    return coo_array((np.ones(2 * len(pairs), dtype=np.int64), places), shape=(num_nodes, num_nodes)).tocsr()


def _components(graph: csr_array, weights: Integers, min_size: int) -> Iterator[tuple[Integers, csr_array]]:
    """Yield the nodes and the edges of each connected component that may hold a clique, few nodes first.

    In each of them, the nodes with the heaviest neighbours come first.
    """
    kept = _core(graph, weights, min_size)
    graph = graph[kept][:, kept]
    labels = connected_components(graph, directed=False)[1]
    groups = np.split(labels.argsort(kind="stable"), np.bincount(labels).cumsum()[:-1]) if len(kept) else []
    for group in sorted(groups, key=len):
        part = graph[group]  # all its neighbours are in the group
        columns = np.searchsorted(group, part.indices)
        part = csr_array((part.data, columns, part.indptr), shape=(len(group), len(group)))
        own = weights[kept[group]]
        order = np.lexsort((np.arange(len(group)), -(own + part @ own)))
        yield kept[group[order]], part[order][:, order]


def _core(graph: csr_array, weights: Integers, min_size: int) -> Integers:
    """The nodes that are left when those are taken out, again and again, that with all their neighbours are too few."""
    kept = np.ones(len(weights), dtype=bool)
    while True:
        light = kept & (weights + graph @ (weights * kept) < min_size)
        if not light.any():
            return kept.nonzero()[0]
        kept &= ~light


def _grown_cliques(graph: csr_array, weights: Integers, left: Mask, min_size: int) -> Iterator[list[int]]:
    """Yield a clique grown from every node that is left, by the first that is a neighbour of all, and take it out."""
    graph.sort_indices()
    neighbours = np.split(graph.indices, graph.indptr[1:-1])
    for seed in left.nonzero()[0].tolist():
        clique, candidates = [seed], neighbours[seed][left[neighbours[seed]]] if left[seed] else []
        while len(candidates) and weights[clique].sum() + weights[candidates].sum() >= min_size:
            first = int(candidates[0])
            clique.append(first)
            candidates = np.intersect1d(candidates, neighbours[first], assume_unique=True)
        if left[seed] and weights[clique].sum() >= min_size:
            left[clique] = False
            yield clique


class _Search:
    """Heaviest cliques of a small component, whose sets of nodes are the bits of integers.

    Branch and bound (Tomita and Seki, DMTCS 2003; Kumlander 2004 for weights): a clique has at most one node of each
    class of nodes none of which are neighbours, so it weighs no more than the heaviest of each class together.
    """

    def __init__(self, graph: csr_array, weights: Integers, steps: int) -> None:
        self.weights: list[int] = weights.tolist()
        rows = np.split(graph.indices, graph.indptr[1:-1])
        self.neighbours = [sum(1 << node for node in row.tolist()) for row in rows]
        self.steps = steps
        self.best, self.heaviest = 0, 0

    def cliques(self, left: Mask, min_size: int) -> Iterator[list[int]]:
        """Yield the heaviest clique of what is left, and take it out, while there is one and steps are left."""
        nodes = (1 << len(self.weights)) - 1
        while self.steps > 0 and (best := self._largest(nodes, min_size)):
            clique = list(_members(best))
            nodes &= ~best
            left[clique] = False
            yield clique

    def _largest(self, left: int, min_size: int) -> int:
        """Return the heaviest clique, or the heaviest found while steps are left; no nodes if all are too light."""
        self.best, self.heaviest = 0, min_size - 1
        grown = self._grown(left)
        self._improve(grown, self._weight(grown), 0)
        self._improve(0, 0, left)
        return self.best

    def _weight(self, nodes: int) -> int:
        return sum(self.weights[node] for node in _members(nodes))

    def _grown(self, candidates: int) -> int:
        """Grow a clique from the first candidate, by the first that is a neighbour of all, and so on."""
        clique = 0
        while candidates:
            first = candidates & -candidates
            clique |= first
            candidates &= self.neighbours[first.bit_length() - 1]
        return clique

    def _improve(self, clique: int, weight: int, candidates: int) -> None:
        """Look for a heavier clique than the best among those that add some of the candidates to a clique."""
        if weight > self.heaviest:
            self.best, self.heaviest = clique, weight
        if not candidates or self.steps <= 0:
            return
        for node, bound in reversed(self._bounds(candidates)):
            if weight + bound <= self.heaviest or self.steps <= 0:
                return
            self._improve(clique | 1 << node, weight + self.weights[node], candidates & self.neighbours[node])
            candidates ^= 1 << node

    def _bounds(self, candidates: int) -> list[tuple[int, int]]:
        """Return the candidates class by class, each with a bound of the cliques among itself and those before it."""
        bounds, below = [], 0
        while candidates:
            free, heaviest = candidates, 0
            while free:
                node = (free & -free).bit_length() - 1
                heaviest = max(heaviest, self.weights[node])
                bounds.append((node, below + heaviest))
                candidates ^= 1 << node
                free &= candidates & ~self.neighbours[node]
            below += heaviest
        self.steps -= len(bounds)
        return bounds


def _members(nodes: int) -> Iterator[int]:
    while nodes:
        first = nodes & -nodes
        yield first.bit_length() - 1
        nodes ^= first
