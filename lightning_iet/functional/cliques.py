"""Cliques of a graph of near duplicates."""

from collections.abc import Iterator

import networkx as nx
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

__all__ = ["disjoint_cliques"]

_EXACT = 100  # nodes of a tangle up to which its largest clique is found exactly; a second or so


def disjoint_cliques(pairs: Tensor, *, min_size: int = 10) -> list[Tensor]:
    """Take the largest clique out of a graph, again and again, while it has ``min_size`` nodes.

    Where groups of near duplicates stand apart, these are the groups. Where cliques overlap, every image goes to the
    largest that it is in *(our choice, so that images are counted once)*; of equally large ones either may be taken.

    To find the largest clique is NP-hard. In tangles of more than 100 images, some pairs of which are near duplicates
    and some not, cliques are therefore grown greedily *(our choice)*: all are cliques, but larger ones may exist.

    Args:
        pairs: the edges, each once, shape ``(P, 2)``.
        min_size: the smallest clique, at least 2.

    Returns:
        The nodes of each clique, ascending; the largest clique first.

    Raises:
        ValueError: if ``min_size`` is less than 2.

    Example:
        >>> disjoint_cliques(torch.tensor([[0, 1], [0, 2], [1, 2], [2, 3], [7, 8]]), min_size=2)
        [tensor([0, 1, 2]), tensor([7, 8])]
    """
    if min_size < 2:
        raise ValueError(f"Argument `min_size` expected at least 2, but got {min_size}. The published one is 10.")
    cliques = [clique for part in _components(pairs.cpu()) for clique in _of_component(part, min_size)]
    ordered = sorted(cliques, key=lambda clique: (-len(clique), clique))
    return [torch.tensor(clique, device=pairs.device) for clique in ordered]


def _components(pairs: Tensor) -> list[Tensor]:
    """The edges of each connected component."""
    if len(pairs) == 0:
        return []
    nodes, edges = pairs.unique(return_inverse=True)
    ones = torch.ones(len(edges), dtype=torch.bool)
    graph = coo_array((ones.numpy(), tuple(edges.T.numpy())), shape=(len(nodes), len(nodes)))
    labels = torch.from_numpy(connected_components(graph, directed=False)[1])[edges[:, 0]]
    order = labels.argsort(stable=True)
    return list(pairs[order].split(labels.bincount().tolist()))


def _of_component(edges: Tensor, min_size: int) -> Iterator[list[int]]:
    nodes = edges.unique().tolist()
    if 2 * len(edges) == len(nodes) * (len(nodes) - 1):  # complete, as most groups of copies are
        if len(nodes) >= min_size:
            yield nodes
        return
    # Only nodes of this core can be in a clique of that size.
    graph = nx.k_core(nx.Graph(edges.tolist()), min_size - 1)
    for part in list(nx.connected_components(graph)):
        search = _largest if len(part) <= _EXACT else _greedy
        yield from search(nx.Graph(graph.subgraph(sorted(part))), min_size)


def _largest(graph: "nx.Graph[int]", min_size: int) -> Iterator[list[int]]:
    while len(graph) >= min_size:
        clique = sorted(nx.max_weight_clique(graph, weight=None)[0])
        if len(clique) < min_size:
            return
        yield clique
        graph.remove_nodes_from(clique)


def _greedy(graph: "nx.Graph[int]", min_size: int) -> Iterator[list[int]]:
    """Grow a clique from every node that is left, adding neighbours of many neighbours first."""
    by_degree = sorted(graph, key=lambda node: (-graph.degree[node], node))
    rank = {node: place for place, node in enumerate(by_degree)}
    for seed in by_degree:
        if seed not in graph:
            continue
        clique, candidates = [seed], set(graph[seed])
        for node in sorted(candidates, key=rank.__getitem__):
            if node in candidates:
                clique.append(node)
                candidates &= graph[node].keys()
        if len(clique) >= min_size:
            yield sorted(clique)
            graph.remove_nodes_from(clique)
