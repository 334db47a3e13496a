"""Exact nearest neighbours among images, in memory that does not grow with the product of the two set sizes."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_iet.functional.images import image_rows, unit_interval
from lightning_iet.functional.precision import full_precision

__all__ = ["nearest_neighbors", "search_rows", "squared_norms"]

_CHUNK = 8192  # references per top-k: a wide top-k costs far less than many narrow ones
_QUERIES = 1024  # queries per pass over the references
_FLOATS = 2**21  # values (8 MiB) that are converted to float32 at a time
_SPARE = 14  # candidates kept beyond k, so that rounding at the edge rarely asks for a second look
_TOLERANCE = 1e-4  # relative error that a distance may have


def nearest_neighbors(
    queries: Tensor, references: Tensor, k: int, *, chunk_size: int = _CHUNK
) -> tuple[Tensor, Tensor]:
    r"""Find the ``k`` nearest references of every query, exactly, in squared l2 distance.

    .. math:: D_{ij} = \lVert x_i - y_j \rVert^2
        = \lVert x_i \rVert^2 + \lVert y_j \rVert^2 - 2 \langle x_i, y_j \rangle

    The right-hand side is one matrix product, but it cancels where :math:`D` is small against the norms, which is just
    where copies live. So it only proposes candidates; those whose value or rank it leaves open are computed again as
    :math:`\sum (x - y)^2`, and a query whose candidates are not provably complete is searched again with more of them.
    References are streamed: beside the inputs, memory holds one block of estimates and the best candidates so far.

    Args:
        queries: shape ``(Q, ...)``, uint8 or floating point in [0, 1].
        references: shape ``(N, ...)``, the same shape per image; the dtype may differ.
        k: neighbours per query, ``1 <= k <= N``.
        chunk_size: references per block of estimates. It bounds the memory and does not change the result.

    Returns:
        Squared distances, float32, shape ``(Q, k)``, ascending, and the references' indices, int64, shape ``(Q, k)``.
        Of equally distant references the one with the lowest index comes first.

    Raises:
        TypeError: as :func:`~lightning_iet.functional.images.image_rows`.
        ValueError: as :func:`~lightning_iet.functional.images.image_rows`; if the images' shapes differ, or ``k`` or
            ``chunk_size`` is out of range.

    Example:
        >>> references = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.0]])
        >>> distances, indices = nearest_neighbors(torch.tensor([[0.5, 0.25]]), references, k=2)
        >>> distances, indices
        (tensor([[0.0625, 0.3125]]), tensor([[2, 0]]))
    """
    if isinstance(queries, Tensor) and isinstance(references, Tensor) and queries.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"Argument `queries` expected images of the references' shape {tuple(references.shape[1:])}, "
            f"but got {tuple(queries.shape[1:])}. Resize or convert them first."
        )
    rows = image_rows(queries, name="queries"), image_rows(references, name="references")
    if not 1 <= k <= len(references):
        raise ValueError(
            f"Argument `k` expected a number from 1 to the number of references, {len(references)}, but got {k}. "
            "Pass a smaller `k` or more references."
        )
    if chunk_size < 1:
        raise ValueError(f"Argument `chunk_size` expected a positive number, but got {chunk_size}. Leave it out.")
    return search_rows(*rows, k, chunk_size=chunk_size)


@torch.no_grad()
def squared_norms(rows: Tensor) -> Tensor:
    """Return the squared l2 norm of every row in [0, 1].

    Args:
        rows: shape ``(N, D)``, as :func:`~lightning_iet.functional.images.image_rows` returns them.

    Returns:
        Shape ``(N,)``, float32.

    Example:
        >>> squared_norms(torch.tensor([[0, 255], [51, 0]], dtype=torch.uint8))
        tensor([1.0000, 0.0400])
    """
    # A norm, unlike a sum of squares, needs no copy of the rows.
    return torch.cat([torch.linalg.vector_norm(part, dim=1).square() for part in _unit_slices(rows)])


@torch.no_grad()
def search_rows(
    queries: Tensor,
    references: Tensor,
    k: int,
    *,
    norms: Tensor | None = None,
    ties: bool = True,
    chunk_size: int = _CHUNK,
) -> tuple[Tensor, Tensor]:
    """Do the work of :func:`nearest_neighbors` on rows that ``image_rows`` has already checked.

    Args:
        queries: shape ``(Q, D)``.
        references: shape ``(N, D)``.
        k: neighbours per query, ``1 <= k <= N``.
        norms: ``squared_norms(references)``, shape ``(N,)``, where it is at hand from an earlier search.
        ties: put neighbours in the right order also where their distances differ by a rounding error. Where only the
            distances matter, leave it off and save time.
        chunk_size: references per block of estimates.

    Returns:
        Squared distances and indices, shape ``(Q, k)`` each.

    Example:
        >>> rows = image_rows(torch.tensor([[0], [51], [255]], dtype=torch.uint8))
        >>> search_rows(rows[:1], rows, k=3)[0]
        tensor([[0.0000, 0.0400, 1.0000]])
    """
    search = _Search(references, squared_norms(references) if norms is None else norms, k, ties, chunk_size)
    with full_precision(queries.device.type):
        found = [search.nearest(block, k + _SPARE) for block in queries.split(min(_QUERIES, _slice_rows(queries) * 4))]
    return torch.cat([distances for distances, _ in found]), torch.cat([indices for _, indices in found])


class _Search(NamedTuple):
    """One search: what stays the same from a block of queries to the next."""

    references: Tensor
    norms: Tensor
    k: int
    ties: bool
    chunk_size: int

    def nearest(self, queries: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return the ``k`` nearest of one block of queries, found among ``width > k`` candidates for each."""
        rows = unit_interval(queries)
        norms = squared_norms(rows)[:, None]
        estimates, indices = self._candidates(rows, width)
        estimates = (estimates + norms).clamp_(min=0)
        distances, indices = _order(self._refined(rows, norms, estimates, indices), indices)
        distances, indices = distances[:, : self.k], indices[:, : self.k]
        if width < len(self.references):
            farthest = distances[:, -1:]
            rounding = _rounding(norms, farthest, rows.shape[1])  # bounds that of all nearer references as well
            open_ = (farthest + 2 * rounding >= estimates[:, -1:]).squeeze(1).nonzero().squeeze(1)
            if len(open_):  # many references within rounding of the farthest, as in a set full of duplicates
                distances[open_], indices[open_] = self.nearest(queries[open_], 4 * width)
        return distances, indices

    def _candidates(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return the ``width`` smallest of ``|y|^2 - 2 <x, y>`` for every row x, ascending, and their indices."""
        best = rows.new_empty(len(rows), 0)
        indices = torch.empty_like(best, dtype=torch.int64)
        for start in range(0, len(self.references), self.chunk_size):
            block = slice(start, start + self.chunk_size)
            estimates = self._partial_distances(rows, self.references[block], self.norms[block])
            top, positions = estimates.topk(min(width, estimates.shape[1]), largest=False)
            best, indices = torch.cat([best, top], dim=1), torch.cat([indices, positions + start], dim=1)
            best, positions = best.topk(min(width, best.shape[1]), largest=False)
            indices = indices.gather(1, positions)
        return best, indices

    @staticmethod
    def _partial_distances(rows: Tensor, block: Tensor, norms: Tensor) -> Tensor:
        """Return ``|y|^2 - 2 <x, y>``; the term ``|x|^2`` does not change the order, and is added to who stays."""
        if block.dtype != torch.uint8:
            return torch.addmm(norms, rows, block.T, alpha=-2)
        return torch.cat([rows @ y.T for y in _unit_slices(block)], dim=1).mul_(-2).add_(norms)

    def _refined(self, rows: Tensor, norms: Tensor, estimates: Tensor, indices: Tensor) -> Tensor:
        """Compute anew, as a sum of squared differences, the estimates whose value or rank rounding leaves open."""
        rounding = _rounding(norms, estimates, rows.shape[1])
        open_ = _TOLERANCE * estimates < rounding
        if self.ties:
            tied = estimates.diff(dim=1) < rounding[:, 1:]
            open_[:, 1:] |= tied
            open_[:, :-1] |= tied
            open_[:, :2] = True  # few, and the two whose ratio is held against a threshold
        row, column = open_.nonzero(as_tuple=True)
        index = indices[row, column]
        step = _slice_rows(rows)
        pairs = zip(row.split(step), index.split(step), strict=True)
        parts = [self._squared_differences(rows, i, j) for i, j in pairs]
        return estimates.index_put((row, column), torch.cat(parts))

    def _squared_differences(self, rows: Tensor, i: Tensor, j: Tensor) -> Tensor:
        references = unit_interval(self.references.index_select(0, j))
        return squared_norms(rows.index_select(0, i).sub_(references))


def _rounding(norms: Tensor, distances: Tensor, dimension: int) -> Tensor:
    """Bound the error of float32 estimates ``|x|^2 + |y|^2 - 2 <x, y>``: a few ulps, and a random walk, of the norms.

    ``|y|`` is at most ``|x|`` plus the distance. The factor is *(our choice)*: above the largest error that we measured
    on a CPU, for 1 to 49,152 dimensions, in 60,000 to 400,000 pairs each.
    """
    ulps = 8 + dimension**0.5 / 27
    return ulps * torch.finfo(torch.float32).eps * (norms + (norms.sqrt() + distances.sqrt()).square())


def _order(distances: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row by distance, and by index where distances are equal."""
    indices, positions = indices.sort(dim=1)
    distances, positions = distances.gather(1, positions).sort(dim=1, stable=True)
    return distances, indices.gather(1, positions)


def _unit_slices(rows: Tensor) -> Iterator[Tensor]:
    """Yield the rows as float32: uint8 rows slice by slice, so that there is never a float copy of all of them."""
    return map(unit_interval, rows.split(_slice_rows(rows))) if rows.dtype == torch.uint8 else iter((rows,))


def _slice_rows(rows: Tensor) -> int:
    return max(1, _FLOATS // max(1, rows.shape[1]))
