"""Nearest neighbours by one matrix product of all queries with all references: the search that any data allow."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_iet.functional.exact_distances import RELATIVE_ERROR, pair_distances, sort_neighbors

__all__ = ["ExhaustiveSearch", "float_rows", "float_slices", "rounding", "squared_norms"]

_FLOATS = 2**20  # values (4 MiB) that are converted to float32 at a time
_DEPTH = 2048  # values of a row that go into one matrix product
_SPARE = 14  # candidates kept beyond k, so that rounding at the edge rarely asks for a second look
_PAIRS = 2**18  # candidates of all queries together, when some are searched again
_UNIT = 2.0**-24  # the relative error of one float32 rounding


def float_rows(rows: Tensor) -> Tensor:
    """Return rows in float32; uint8 divided by 255.

    Args:
        rows: any shape, uint8 or floating point.

    Returns:
        The same shape; the same tensor if it is float32 already.

    Example:
        >>> float_rows(torch.tensor([[0, 51]], dtype=torch.uint8))
        tensor([[0.0000, 0.2000]])
    """
    return rows.float().div_(255) if rows.dtype == torch.uint8 else rows.float()


def float_slices(rows: Tensor) -> Iterator[Tensor]:
    """Yield all rows in float32, a slice at a time, so that there is never a float copy of all of them.

    Args:
        rows: shape ``(N, D)``.

    Yields:
        Shape ``(n, D)``, one after the other.

    Example:
        >>> [part.shape for part in float_slices(torch.zeros(2100, 1000))]
        [torch.Size([1048, 1000]), torch.Size([1048, 1000]), torch.Size([4, 1000])]
    """
    return map(float_rows, rows.split(_slice_length(rows)))


def _slice_length(rows: Tensor) -> int:
    return max(1, _FLOATS // max(1, rows.shape[1]))


@torch.no_grad()
def squared_norms(rows: Tensor) -> Tensor:
    """Return the squared l2 norm of every row in [0, 1], correctly rounded.

    Summed in float64: in float32 the norm of an image of one colour may be off by thousands of roundings, since all of
    them go the same way.

    Args:
        rows: shape ``(N, D)``, uint8 or floating point.

    Returns:
        Shape ``(N,)``, float32.

    Example:
        >>> squared_norms(torch.tensor([[0, 255], [51, 0]], dtype=torch.uint8))
        tensor([1.0000, 0.0400])
    """
    norms = torch.empty(len(rows), device=rows.device)
    for part, out in zip(float_slices(rows), norms.split(_slice_length(rows)), strict=True):
        out.copy_(torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square_())
    return norms


class ExhaustiveSearch(NamedTuple):
    r"""The ``k`` nearest of a set of references, found by matrix products.

    Estimates :math:`\lVert x \rVert^2 + \lVert y \rVert^2 - 2 \langle x, y \rangle` propose ``k`` candidates and a few
    more; distances by differences decide among them. A query for which :func:`rounding` cannot exclude that a true
    neighbour was not proposed is searched again with more candidates.

    Example:
        >>> references = torch.tensor([[0.0], [0.5], [1.0]])
        >>> ExhaustiveSearch(references, squared_norms(references), k=2).nearest(torch.tensor([[0.75]]))
        (tensor([[0.0625, 0.0625]]), tensor([[1, 2]]))
    """

    references: Tensor
    norms: Tensor
    k: int
    ties: bool = True
    chunk_size: int = 8192

    def nearest(self, queries: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the squared distances, float32, and indices of the ``k`` nearest, among ``width > k`` candidates."""
        width = min(width or self.k + _SPARE, len(self.references))
        norms = squared_norms(queries)[:, None]
        estimates, indices = self._candidates(float_rows(queries), width)
        estimates = (estimates + norms).clamp_(min=0)
        distances = self._measured(queries, norms, estimates, indices)
        distances, indices = sort_neighbors(queries, self.references, distances, indices, self.k, ties=self.ties)
        if width < len(self.references):
            farthest = distances[:, -1:] * (1 + RELATIVE_ERROR)
            reach = farthest + rounding(_lengths(norms, farthest), queries.shape[1])
            open_ = (reach >= estimates[:, -1:]).squeeze(1).nonzero().squeeze(1)
            # Not empty where many references are within rounding of the farthest, as in a set full of duplicates.
            for part in open_.split(max(1, _PAIRS // (4 * width))):
                distances[part], indices[part] = self.nearest(queries[part], 4 * width)
        return distances, indices

    def _candidates(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return the ``width`` smallest of ``|y|^2 - 2 <x, y>`` for every row x, ascending, and their indices."""
        best = rows.new_empty(len(rows), 0)
        indices = torch.empty_like(best, dtype=torch.int64)
        for start in range(0, len(self.references), self.chunk_size):
            block = slice(start, start + self.chunk_size)
            estimates = _partial_distances(rows, self.references[block], self.norms[block])
            top, positions = estimates.topk(min(width, estimates.shape[1]), largest=False)
            best, indices = torch.cat([best, top], dim=1), torch.cat([indices, positions + start], dim=1)
            best, positions = best.topk(min(width, best.shape[1]), largest=False)
            indices = indices.gather(1, positions)
        return best, indices

    def _measured(self, queries: Tensor, norms: Tensor, estimates: Tensor, indices: Tensor) -> Tensor:
        """Measure the candidates by differences; without ``ties`` only those whose value rounding leaves open."""
        open_ = torch.ones_like(indices, dtype=torch.bool)
        if not self.ties:
            open_ = RELATIVE_ERROR * estimates < _usual_rounding(_lengths(norms, estimates), queries.shape[1])
            open_[:, :2] = True  # few, and the two whose ratio is held against a threshold
        row, column = open_.nonzero(as_tuple=True)
        measured = pair_distances(queries, self.references, row, indices[row, column])
        return estimates.double().index_put((row, column), measured)


def _partial_distances(rows: Tensor, block: Tensor, norms: Tensor) -> Tensor:
    """Return ``|y|^2 - 2 <x, y>``; the term ``|x|^2`` does not change the order, and is added to who stays.

    Rows are summed in equal parts of at most ``_DEPTH`` values, which bounds the rounding.
    """
    parts = _parts(rows.shape[1])
    step = len(block) if block.dtype == torch.float32 else _slice_length(block)
    estimates = norms.repeat(len(rows), 1)
    for y, out in zip(block.split(step), estimates.split(step, dim=1), strict=True):
        for x, part in zip(rows.tensor_split(parts, dim=1), float_rows(y).tensor_split(parts, dim=1), strict=True):
            out.addmm_(x, part.T, alpha=-2)
    return estimates


def _parts(dimension: int, depth: int = _DEPTH) -> int:
    return max(1, -(-dimension // max(1, depth)))


def rounding(lengths: Tensor, dimension: int, *, depth: int = _DEPTH) -> Tensor:
    """Bound the error of the estimate ``|x|^2 + |y|^2 - 2 <x, y>``.

    A sum of n products, in whatever order, has an error of at most ``n u |x| |y|`` with ``u = 2^-24`` (Higham, Accuracy
    and Stability of Numerical Algorithms, 2nd ed., section 3.1; the terms in u^2 are within the 16 below). A product of
    depth n, its addition to p - 1 others, and a handful of roundings of values of at most ``(|x| + |y|)^2`` make
    ``(n + p + 16) u`` of twice ``|x| |y| <= (|x| + |y|)^2 / 4``.

    Args:
        lengths: at least ``|x| + |y|``.
        dimension: of x and y.
        depth: products are summed in equal parts of at most so many.

    Returns:
        The shape of ``lengths``.

    Example:
        >>> rounding(torch.tensor(60.0), 3072)
        tensor(0.1667)
    """
    parts = _parts(dimension, depth)
    roundings = -(-dimension // parts) + parts + 16
    return roundings / 2 * _UNIT * lengths.square()


def _usual_rounding(lengths: Tensor, dimension: int) -> Tensor:
    """Bound the same error by what we measured, also for images of one colour, where roundings add up; 1.5 times it.

    The proven bound is so much larger that it would have every candidate measured. *(Our choice; on a CPU, up to
    196,608 dimensions: 143 u |x| |y| for one colour, 25 u |x| |y| for others.)*
    """
    return min(dimension + 8, 56 + dimension**0.5 / 9) * _UNIT * lengths.square()


def _lengths(norms: Tensor, distances: Tensor) -> Tensor:
    """Bound ``|x| + |y|`` for any y at no more than these distances: ``|y|`` is at most ``|x|`` plus the distance."""
    return 2 * norms.sqrt() + distances.sqrt()
