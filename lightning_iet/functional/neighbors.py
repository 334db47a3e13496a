"""Exact nearest neighbours among images, in memory that does not grow with the product of the two set sizes."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_iet.functional.precision import full_precision

__all__ = ["image_rows", "nearest_neighbors", "search_rows", "squared_norms", "unit_interval"]

_CHUNK = 8192  # references per top-k: a wide top-k costs far less than many narrow ones
_QUERIES = 1024  # queries per pass over the references
_FLOATS = 2**21  # values (8 MiB) that are converted to float32 at a time
_SPARE = 14  # candidates kept beyond k, so that rounding at the edge rarely asks for a second look
_TOLERANCE = 1e-4  # relative error that a distance may have


def image_rows(images: Tensor, *, name: str = "images") -> Tensor:
    """Check a batch of images and flatten each of them to one row.

    Args:
        images: shape ``(N, ...)``, uint8, or floating point in [0, 1].
        name: what error messages call the argument.

    Returns:
        Shape ``(N, D)``: uint8 stays uint8 (a quarter of the memory), every floating type becomes float32.

    Raises:
        TypeError: if ``images`` is no tensor, or neither uint8 nor floating point.
        ValueError: if there is no dimension to flatten, or a value is NaN or outside [0, 1].

    Example:
        >>> image_rows(torch.tensor([[[0.0, 0.5], [1.0, 0.25]]]))
        tensor([[0.0000, 0.5000, 1.0000, 0.2500]])
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"Argument `{name}` expected a tensor, but got {type(images).__name__}. Convert it by torch.as_tensor."
        )
    if images.ndim < 2:
        raise ValueError(
            f"Argument `{name}` expected shape (N, C, H, W), but got {tuple(images.shape)}. "
            "Add the missing dimensions, e.g. by images[None] for a single image."
        )
    if images.dtype != torch.uint8:
        _check_unit_interval(images, name)
        images = images.to(torch.float32)
    return images.flatten(1)


def _check_unit_interval(images: Tensor, name: str) -> None:
    if not images.is_floating_point():
        raise TypeError(
            f"Argument `{name}` expected dtype uint8 or floating point, but got {images.dtype}. "
            "Convert the images by .to(torch.uint8)."
        )
    if images.numel() == 0:
        return
    low, high = (value.item() for value in images.aminmax())
    if not (low >= 0 and high <= 1):  # written so that NaN, which compares false, is refused as well
        found = "NaN" if low != low else f"values from {low:.4g} to {high:.4g}"
        raise ValueError(
            f"Argument `{name}` expected values in [0, 1], but got {found}. "
            "Scale them, e.g. by ((images + 1) / 2).clamp(0, 1), or pass uint8."
        )


def unit_interval(images: Tensor) -> Tensor:
    """Return images in [0, 1]: uint8 divided by 255, in float32; floating point as it is.

    Args:
        images: any shape, uint8 or floating point.

    Returns:
        The same shape.

    Example:
        >>> unit_interval(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([0.0000, 0.2000, 1.0000])
    """
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images


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
        TypeError: as :func:`image_rows`.
        ValueError: as :func:`image_rows`; if the images' shapes differ, or ``k`` or ``chunk_size`` is out of range.

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
    """Return the squared l2 norm of every row, as the distances' scale has it: uint8 rows count in units of 255.

    Args:
        rows: shape ``(N, D)``, as :func:`image_rows` returns them.

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
    queries: Tensor, references: Tensor, k: int, *, norms: Tensor | None = None, chunk_size: int = _CHUNK
) -> tuple[Tensor, Tensor]:
    """Do the work of :func:`nearest_neighbors` on rows that :func:`image_rows` has already checked.

    Args:
        queries: shape ``(Q, D)``.
        references: shape ``(N, D)``.
        k: neighbours per query, ``1 <= k <= N``.
        norms: ``squared_norms(references)``, shape ``(N,)``, where it is at hand from an earlier search.
        chunk_size: references per block of estimates.

    Returns:
        Squared distances and indices, shape ``(Q, k)`` each.

    Example:
        >>> rows = image_rows(torch.tensor([[0], [51], [255]], dtype=torch.uint8))
        >>> search_rows(rows[:1], rows, k=3)[0]
        tensor([[0.0000, 0.0400, 1.0000]])
    """
    search = _Search(references, squared_norms(references) if norms is None else norms, k, chunk_size)
    with full_precision(queries.device.type):
        found = [search.nearest(block, k + _SPARE) for block in queries.split(min(_QUERIES, _slice_rows(queries) * 4))]
    return torch.cat([distances for distances, _ in found]), torch.cat([indices for _, indices in found])


class _Search(NamedTuple):
    """One search: what stays the same from a block of queries to the next."""

    references: Tensor
    norms: Tensor
    k: int
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
            # By how much a nearer reference may have been overestimated: its norm obeys the triangle inequality.
            rounding = _rounding(norms + (norms.sqrt() + farthest.sqrt()).square(), rows.shape[1])
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
            # The term |x|^2 does not change the order; it is added to the few that stay.
            estimates = torch.cat([rows @ y.T for y in _unit_slices(self.references[block])], dim=1)
            estimates = estimates.mul_(-2).add_(self.norms[block])
            top, positions = estimates.topk(min(width, estimates.shape[1]), largest=False)
            best, indices = torch.cat([best, top], dim=1), torch.cat([indices, positions + start], dim=1)
            best, positions = best.topk(min(width, best.shape[1]), largest=False)
            indices = indices.gather(1, positions)
        return best, indices

    def _refined(self, rows: Tensor, norms: Tensor, estimates: Tensor, indices: Tensor) -> Tensor:
        """Compute anew, as a sum of squared differences, the estimates whose value or rank rounding leaves open."""
        rounding = _rounding(norms + self.norms[indices], rows.shape[1])
        open_ = _TOLERANCE * estimates < rounding
        tied = estimates.diff(dim=1) < rounding[:, 1:]
        open_[:, 1:] |= tied
        open_[:, :-1] |= tied
        open_[:, :2] = True  # the two nearest decide the memorized fraction, and cost little
        row, column = open_.nonzero(as_tuple=True)
        index = indices[row, column]
        step = _slice_rows(rows)
        pairs = zip(row.split(step), index.split(step), strict=True)
        parts = [squared_norms(rows[i].sub_(unit_interval(self.references[j]))) for i, j in pairs]
        return estimates.index_put((row, column), torch.cat(parts))


def _rounding(norms: Tensor, dimension: int) -> Tensor:
    """Bound the error of a float32 estimate by the sum of the two squared norms: a few ulps and a random walk.

    *(our choice)*: above the largest error that we measured among 400,000 pairs of each of 1 to 49,152 dimensions.
    """
    return (4 + dimension**0.5 / 27) * torch.finfo(torch.float32).eps * norms


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
