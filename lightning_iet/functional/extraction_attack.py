"""Extraction of training images by looking for images that a generator emits again and again."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lightning_iet.functional.checks import check_number, image_rows
from lightning_iet.functional.exhaustive_neighbors import float_rows, float_slices, rounding, squared_norms
from lightning_iet.utilities.devices import full_precision

_FLOATS = 2**24  # values (64 MiB) that are held at a time
_SIDE = 4096  # images on each side of a block of pairs, at most
_DEPTH = 2048  # values of an image that go into one matrix product
_PAIRS = 10_000_000  # near duplicates, at most
_EXACT = 400  # nodes of a component up to which its largest clique is searched for; Python's stack holds no more
_STEPS = 4_000_000  # nodes looked at in all searches of a call together; some seconds

Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def check_tiles(images: Tensor, others: Tensor, *, eps: float, grid: int) -> None:
    """Raise a ValueError if images differ in size, ``eps`` is not in (0, 1], or ``grid`` exceeds the shorter side."""
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
        TypeError: as :func:`~lightning_iet.functional.checks.image_rows`.
        ValueError: as :func:`~lightning_iet.functional.checks.image_rows` and :func:`check_tiles`; if there are more
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


def disjoint_cliques(pairs: Tensor, *, min_size: int = 10, sizes: Tensor | None = None) -> list[Tensor]:
    """Take the largest clique out of a graph, again and again, while it has ``min_size`` images.

    Where groups of near duplicates stand apart, these are the groups. Where cliques overlap, every image goes to the
    largest that it is in *(our choice, so that images are counted once)*. Which of equally large ones is taken depends
    on the numbering of the nodes, and so may the number of cliques: number the nodes by what they show, and not by when
    they came, for the same cliques in any order.

    To find the largest clique is NP-hard. In connected components of more than 400 nodes, and in all that are left when
    4 million nodes have been looked at, cliques are therefore grown greedily *(our choice)*: all are cliques, but
    larger ones may exist.

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
    """Raise a ValueError for cliques of a single image."""
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

    networkx has no bound on the steps of a search, and needs six times as long for each.

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
    be that much more frequent to be found; sample more of them, or pass a smaller ``min_size``.

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
        ValueError: as :func:`near_duplicates` and :func:`disjoint_cliques`, for which
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
