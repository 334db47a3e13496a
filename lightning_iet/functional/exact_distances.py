r"""Squared distances of chosen pairs of images, by differences, and the k nearest in a fixed order.

:math:`\lVert x \rVert^2 + \lVert y \rVert^2 - 2 \langle x, y \rangle` cancels just where copies live. Differences do
not, so what is computed here is right for any images. It costs about forty times as much per pair as a matrix product:
a search first rules out, by products, the pairs that do not matter.
"""

import torch
from torch import Tensor

__all__ = ["RELATIVE_ERROR", "merge_nearest", "pair_distances", "sort_neighbors"]

RELATIVE_ERROR = 1e-4
"""The relative error that a distance may have; see `pair_distances`."""
_SEGMENT = 256  # values that are summed in float32 …
_PAIR_ERROR = 2e-5  # … so that, in whatever order, 256 roundings of 6e-8, and a few more, err by less than this
_UNDERFLOW = 1e-30  # squared distances below this lose bits in float32
_CACHED = 2**19  # differences (2 MiB) at a time: they stay in a core's cache
_STEP = 2**14  # pairs whose sums are added up at a time
_WORTH = 2**16  # differences per query from which on a step for each query pays
_LAUNCHED = 2**25  # the same on an accelerator, where many small steps cost more than memory


@torch.no_grad()
def pair_distances(queries: Tensor, references: Tensor, i: Tensor, j: Tensor, *, precise: bool = False) -> Tensor:
    r"""Return :math:`\lVert x_{i} - y_{j} \rVert^2` for a list of pairs.

    Differences and sums of up to 256 squares are float32, which bounds the relative error by 2e-5 in whatever order a
    device sums; the sums of those are float64. Two uint8 images are compared in levels, without rounding.

    Args:
        queries: shape ``(Q, D)``, uint8 (meaning value / 255) or floating point.
        references: shape ``(N, D)``, likewise, on the same device.
        i: indices of queries, shape ``(P,)``; fastest if ascending.
        j: indices of references, shape ``(P,)``.
        precise: compute in float64 throughout, which tells ties from near ties, at three times the cost.

    Returns:
        Shape ``(P,)``, float64.

    Example:
        >>> levels = torch.tensor([[0, 255], [51, 0]], dtype=torch.uint8)
        >>> pair_distances(levels, levels, torch.tensor([0, 1]), torch.tensor([1, 1]))
        tensor([1.0400, 0.0000], dtype=torch.float64)
    """
    levels = queries.dtype == references.dtype == torch.uint8
    wide = precise or torch.float64 in (queries.dtype, references.dtype)
    dimension = queries.shape[1]
    step = max(1, (_CACHED if i.device.type == "cpu" else _LAUNCHED) // max(1, dimension))
    # Two buffers for all steps: fresh memory for each would cost more than the arithmetic.
    size = (min(step, len(i)), dimension)
    buffers = [torch.empty(size, dtype=torch.float64 if wide else torch.float32, device=i.device) for _ in range(2)]
    segment = next((size for size in range(min(_SEGMENT, dimension), 1, -1) if dimension % size == 0), 1)
    roots = buffers[0].new_empty(len(i), dimension // segment)
    lengths, alone = _steps(i, step, dimension)
    for out, a, b in zip(roots.split(lengths), i.split(lengths), j.split(lengths), strict=True):
        x = _gather(queries, a[:1] if alone else a, buffers[0], levels=levels)
        differences = _gather(references, b, buffers[1], levels=levels).sub_(x)
        torch.linalg.vector_norm(differences.view(len(b), -1, segment), dim=2, out=out)
    sums = torch.cat([part.double().square_().sum(dim=1) for part in roots.split(_STEP)])
    return sums / 255**2 if levels else sums


def _steps(i: Tensor, step: int, dimension: int) -> tuple[list[int], bool]:
    """Return how many pairs each step takes, and whether a step has a single query, which saves gathering it."""
    if i.device.type == "cpu":
        runs = i.unique_consecutive(return_counts=True)[1]
        if len(i) * dimension > _WORTH * len(runs):
            return [min(step, run - start) for run in runs.tolist() for start in range(0, run, step)], True
    return [min(step, len(i) - start) for start in range(0, len(i), step)], False


def _gather(rows: Tensor, index: Tensor, buffer: Tensor, *, levels: bool) -> Tensor:
    out = buffer[: len(index)]
    if rows.dtype == out.dtype:
        return torch.index_select(rows, 0, index, out=out)
    chosen = rows.index_select(0, index)
    if rows.dtype == torch.uint8 and not levels:
        chosen = chosen.float().div_(255)  # in float32 first: the numbers that a float image of the same levels holds
    return out.copy_(chosen)


@torch.no_grad()
def sort_neighbors(
    queries: Tensor, references: Tensor, distances: Tensor, indices: Tensor, k: int, *, ties: bool = True
) -> tuple[Tensor, Tensor]:
    """Put candidates in order and return the ``k`` nearest: by distance, and by index where distances are equal.

    Neighbours whose order is open within the error of :func:`pair_distances` are measured again in float64. Equal means
    the same float32 number *(our choice: so the order can be told from what is returned, and lists that several
    processes found merge into the list that one would have found)*.

    Args:
        queries: shape ``(Q, D)``.
        references: shape ``(N, D)``.
        distances: of the candidates, shape ``(Q, M)``, float64; infinite where there is none.
        indices: of the candidates, shape ``(Q, M)``.
        k: how many to return, at most ``M``.
        ties: leave off where the order of near ties does not matter.

    Returns:
        Squared distances, float32, and indices, shape ``(Q, k)`` each.

    Example:
        >>> references = torch.tensor([[0.5], [0.0], [0.5]])
        >>> candidates = torch.tensor([[0.25, 0.0, 0.25]], dtype=torch.float64), torch.tensor([[2, 1, 0]])
        >>> sort_neighbors(torch.zeros(1, 1), references, *candidates, k=2)
        (tensor([[0.0000, 0.2500]]), tensor([[1, 0]]))
    """
    distances, order = distances.sort(dim=1)
    indices = indices.gather(1, order)
    if ties:
        close = distances.diff(dim=1) <= 2 * _PAIR_ERROR * distances[:, 1:]
        open_ = distances < _UNDERFLOW
        open_[:, 1:] |= close
        open_[:, :-1] |= close
        row, column = (open_ & distances.isfinite()).nonzero(as_tuple=True)
        distances[row, column] = pair_distances(queries, references, row, indices[row, column], precise=True)
    return _first(distances.float(), indices, k)


def merge_nearest(*found: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Merge lists of nearest neighbours of the same queries, found among different (or overlapping) references.

    The result is the list that one search among all of them finds. Merging is associative and commutative, and a
    reference that stands in several lists counts once, so the lists may come from any number of processes.

    Args:
        found: squared distances and indices, shape ``(Q, M)`` each, any ``M``. At an infinite distance is no neighbour.
        k: how many to keep.

    Returns:
        Squared distances, ascending, and indices, shape ``(Q, k)`` each; where there are fewer than ``k``, the last are
        infinite, with index -1.

    Example:
        >>> first = torch.tensor([[0.0, 2.0]]), torch.tensor([[7, 3]])
        >>> second = torch.tensor([[1.0, 2.0]]), torch.tensor([[5, 3]])
        >>> merge_nearest(first, second, k=3)
        (tensor([[0., 1., 2.]]), tensor([[7, 5, 3]]))
    """
    distances = torch.cat([distances for distances, _ in found], dim=1)
    indices = torch.cat([indices for _, indices in found], dim=1)
    indices, order = indices.masked_fill(distances == torch.inf, -1).sort(dim=1, stable=True)
    distances = distances.gather(1, order)
    again = indices.diff(dim=1) == 0
    distances[:, 1:].masked_fill_(again, torch.inf)
    missing = max(0, k - distances.shape[1])
    distances = torch.nn.functional.pad(distances, (0, missing), value=torch.inf)
    indices = torch.nn.functional.pad(indices, (0, missing), value=-1)
    return _first(distances, indices.masked_fill(distances == torch.inf, -1), k)


def _first(distances: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the first ``k`` by (distance, index)."""
    indices, order = indices.sort(dim=1)
    distances, order = distances.gather(1, order).sort(dim=1, stable=True)
    return distances[:, :k], indices.gather(1, order)[:, :k]
