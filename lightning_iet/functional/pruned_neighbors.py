r"""Nearest neighbours of images among many, on a CPU: codes rule most pairs out, and the rest is measured.

For a block of queries:

1. Bound all squared distances from below by codes: one matrix product that costs a small part of that of the images.
   Codes are the images' projections on a few directions and the norm of what these leave out, 65 to 385 columns instead
   of thousands; or, where the CPU multiplies 8-bit integers several times as fast as float32, the images rounded to 256
   levels. Take the minimum over each group of 32 references.
2. Take ``k`` and a few *seeds*, those that are probably the nearest. The ``k``-th of them bounds what is sought.
3. Take, of the other references, those whose lower bound is not above that. Nothing else can be a neighbour.
4. Estimate these few hundred by scalar products, and measure by differences what these leave open.

Nothing depends on luck but the time: a query for which too little is ruled out is handed back, for another search.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_iet.functional.exhaustive_neighbors import (
    RELATIVE_ERROR,
    ExhaustiveSearch,
    float_rows,
    integer_products,
    pair_distances,
    rounding,
    sort_neighbors,
    squared_norms,
)

PAIR_COST = 40
"""What a pair costs by differences over what it costs in a matrix product; measured on one and on two cores."""
_CHOSEN_COST = 10  # likewise, of a pair of float32 images by its own product; measured: 8 to 9
_VALUES = 2**20  # of images (8 MiB in float64) that are projected at a time
_GROUP = 32  # references per minimum
_PRODUCT = 4096  # references per product: its result stays in the cache
SPARE = 14
"""Seeds beyond ``k``."""
_UNIT = 2.0**-24  # the relative error of one float32 rounding
_LEAST_RANGE = 1e-20  # of values that are cut into levels


class Codes(NamedTuple):
    """Codes of a set of images, and what is needed to compare them safely.

    Attributes:
        z: projections and the norm of the rest, float32, shape ``(N, d + 1)``; or levels, int8, shape ``(N, D)``.
        norms: squared norms of ``z``, in the images' unit, float64, shape ``(N,)``.
        slack: how far an image may be from what its code says, float64, shape ``(N,)``: distances of codes exceed
            distances of images by no more than the sum of both slacks.
    """

    z: Tensor
    norms: Tensor
    slack: Tensor


class Projection(NamedTuple):
    """Where codes are taken from.

    Attributes:
        mean: subtracted from every image, float64, shape ``(D,)``. Any will do; a mean keeps numbers small.
        basis: orthonormal columns, float64, shape ``(D, d)``, ``d <= 384``.
    """

    mean: Tensor
    basis: Tensor

    def codes(self, rows: Tensor) -> Codes:
        r"""Return the codes of images, shape ``(N, D)``, uint8 (meaning value / 255) or floating point.

        Computed in float64 and rounded once. A component of :math:`p` has an error of at most :math:`2^{-53} D |x|`,
        so :math:`p` of 384 components one of :math:`20` times that, so :math:`r^2 = |x|^2 - |p|^2` one of at most
        :math:`42 \cdot 2^{-53} D |x|^2`, and :math:`r` one of :math:`6.9 \cdot 10^{-8} \sqrt{D} |x|`. With one rounding
        to float32 that is less than the slack, :math:`10^{-7} (\sqrt{D} + 1) |x|`.
        """
        z = torch.empty(len(rows), self.basis.shape[1] + 1, device=rows.device)
        lengths = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
        step = max(1, _VALUES // max(1, rows.shape[1]))
        # One buffer for all steps: fresh memory for each costs several times the arithmetic.
        buffer = torch.empty(min(step, len(rows)), rows.shape[1], dtype=torch.float64, device=rows.device)
        for part, z_out, length_out in zip(rows.split(step), z.split(step), lengths.split(step), strict=True):
            centred = buffer[: len(part)].copy_(part)
            if rows.dtype == torch.uint8:
                centred.div_(255)
            projected = centred.sub_(self.mean) @ self.basis
            torch.linalg.vector_norm(centred, dim=1, out=length_out)
            squared = length_out.square() - projected.square().sum(dim=1)
            z_out[:, :-1], z_out[:, -1] = projected, squared.clamp_(min=0).sqrt_()
        return Codes(z, z.double().square().sum(dim=1), 1e-7 * (rows.shape[1] ** 0.5 + 1) * lengths)


class Levels(NamedTuple):
    """How images become 8-bit integers: ``round((x - offset) * per_unit)``, from -128 to 127.

    Attributes:
        offset: the value that becomes 0.
        per_unit: levels in a difference of 1; a float32 number, so that its product errs by one rounding alone.
    """

    offset: float
    per_unit: float

    @classmethod
    def of(cls, sample: Tensor) -> "Levels":
        """Cut the range of a sample into 256 levels, such that images of 8 bits are met exactly."""
        low, high = (part.item() for part in sample.float().aminmax())
        per_unit = torch.tensor(255 / max(high - low, _LEAST_RANGE), dtype=torch.float32).item()
        return cls(torch.tensor(low + 128 / per_unit, dtype=torch.float32).item(), per_unit)

    def codes(self, rows: Tensor) -> Codes:
        r"""Return the codes of images, shape ``(N, D)``, uint8 (meaning value / 255) or floating point.

        Computed in float32 at least: a difference and a product err by :math:`2^{-23}` of the result, which is
        :math:`2 \cdot 10^{-5}` levels of a component within 128 levels, and beyond less than :math:`10^{-6}` of what
        rounding leaves. 8-bit images are their float32 quotients by 255, as in every distance of this package. The
        slack is the norm of what rounding leaves, and more than these.
        """
        z = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
        norms, slack = torch.empty(2, len(rows), dtype=torch.float64, device=rows.device)
        step = max(1, _VALUES // max(1, rows.shape[1]))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            values = rows[part] if rows.dtype == torch.float64 else float_rows(rows[part])
            exact = (values - self.offset).mul_(self.per_unit)
            level = exact.round().clamp_(-128, 127)
            z[part] = level
            slack[part] = torch.linalg.vector_norm(exact.sub_(level), dim=1, dtype=torch.float64)
            norms[part] = torch.linalg.vector_norm(level, dim=1, dtype=torch.float64)
        slack = slack.mul_(1 + 1e-5).add_(4e-5 * rows.shape[1] ** 0.5)
        return Codes(z, norms.div_(self.per_unit).square_(), slack.div_(self.per_unit))


def principal_directions(rows: Tensor, number: int) -> Projection:
    """Return a projection on about the first so many principal components of a sample of images, shape ``(N, D)``.

    Two rounds of subspace iteration from a random start (Halko, Martinsson, Tropp 2011, algorithm 4.4), the same at
    every call; the components come in descending order of variance. How close they are to the principal ones decides
    how much a search saves, never what it finds.
    """
    sample = float_rows(rows)
    mean = sample.mean(dim=0)
    sample = sample - mean
    start = torch.randn(len(rows), number, generator=torch.Generator().manual_seed(0)).to(rows.device)
    span = torch.linalg.qr(sample.T @ start).Q
    span = torch.linalg.qr(sample.T @ (sample @ span)).Q
    turn = torch.linalg.svd(sample @ span, full_matrices=False).Vh.T
    # Once more in float64, to make the columns orthonormal to 15 digits.
    return Projection(mean.double(), torch.linalg.qr((span @ turn).double()).Q)


def candidate_cost(queries: Tensor, references: Tensor) -> int:
    """Return what a candidate that is not ruled out costs, over what a pair costs in a matrix product."""
    return _CHOSEN_COST if _by_products(queries, references) else PAIR_COST


def _by_products(queries: Tensor, references: Tensor) -> bool:
    return queries.dtype == references.dtype == torch.float32


@torch.no_grad()
def pair_bounds(queries: Tensor, references: Tensor, norms: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    r"""Bound :math:`\lVert x_i - y_j \rVert^2` from below and above, on a CPU, shape ``(P,)``, float64.

    Float32 images are compared by :math:`\lVert x \rVert^2 + \lVert y \rVert^2 - 2 \langle x, y \rangle` and the
    rounding of that; others are measured. Indices of queries, ``i``, must ascend; ``norms`` are the references'.
    """
    if not _by_products(queries, references):
        distances = pair_distances(queries, references, i, j)
        return distances * (1 - RELATIVE_ERROR), distances * (1 + RELATIVE_ERROR)
    x, y = squared_norms(queries).double()[i], norms.double()[j]
    estimates = x + y - 2 * _products(queries, references, i, j).double()
    error = rounding(x.sqrt() + y.sqrt(), queries.shape[1], depth=queries.shape[1])
    return estimates - error, estimates + error


def _products(queries: Tensor, references: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Return ``<x_i, y_j>``. Torch computes chosen products without gathering their rows only as a sparse matrix.

    References are its rows, so that each of them, of which there are many more than queries, is read from memory once.
    """
    order = j.argsort(stable=True)
    starts = torch.zeros(len(references) + 1, dtype=torch.int64)
    starts[1:] = j.bincount(minlength=len(references)).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)  # "in beta", "checks are disabled"
        shape = len(references), len(queries)
        chosen = torch.sparse_csr_tensor(starts, i[order], torch.zeros(len(j)), size=shape)
        found = torch.sparse.sampled_addmm(chosen, references, queries.T, beta=0.0).values()
    return torch.empty_like(found).scatter_(0, order, found)


class _References(NamedTuple):
    """Codes of the references, in groups."""

    columns: Tensor  # (d + 2, G * 32): z and its squared norm; of levels (D, G * 32), z alone
    norms: Tensor  # (G * 32,): the squared norms; infinite where a group is not full
    rest: Tensor  # (G, 32): the last component of z; of levels 0
    length: float  # the largest norm of z
    slack: float  # the largest slack


class PrunedSearch:
    """The ``k`` nearest of a set of references.

    Args:
        exhaustive: the search to be sped up; holds the references.
        projection: where codes are taken from, or levels that they are rounded to.

    Example:
        >>> references = torch.rand(100, 12, generator=torch.Generator().manual_seed(0))
        >>> exhaustive = ExhaustiveSearch(references, references.square().sum(1), k=2)
        >>> projection = Projection(torch.zeros(12).double(), torch.eye(12).double()[:, :6])
        >>> PrunedSearch(exhaustive, projection).nearest(references[:1] / 2, torch.full((1,), torch.inf))
        (tensor([[0.4302, 0.5437]]), tensor([[93, 16]]), tensor([True]))
    """

    def __init__(self, exhaustive: ExhaustiveSearch, projection: Projection | Levels) -> None:
        self.exhaustive = exhaustive
        self.projection = projection
        self.k = exhaustive.k
        self.references = exhaustive.references
        self.codes = self._reference_codes()
        self._norms = exhaustive.norms
        self._memory = torch.empty(0)  # of lower bounds; fresh memory for every block costs as much as the product

    def _reference_codes(self) -> _References:
        codes = self.projection.codes(self.references)
        missing = -len(codes.z) % _GROUP
        z = torch.nn.functional.pad(codes.z, (0, 0, 0, missing))
        norms = torch.nn.functional.pad(codes.norms.float(), (0, missing), value=torch.inf)
        if isinstance(self.projection, Levels):
            columns, rest = z.T, torch.zeros_like(norms)  # columns of which lie in memory one after the other
        else:
            columns, rest = torch.cat([z, norms[:, None]], dim=1).T.contiguous(), z[:, -1]
        length, slack = codes.norms.max().sqrt().item(), codes.slack.max().item()
        return _References(columns, norms, rest.reshape(-1, _GROUP), length, slack)

    @torch.no_grad()
    def nearest(self, queries: Tensor, farthest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the squared distances, float32, and indices of the ``k`` nearest references.

        Args:
            queries: a block of some hundred, shape ``(Q, D)``.
            farthest: squared distances, shape ``(Q,)``, beyond which nothing is sought; infinite if unknown. Of
                neighbours beyond it some may be missing from the result, in whose place stand farther ones.

        Returns:
            Shape ``(Q, k)`` each; and which rows hold, shape ``(Q,)``; a row fails if too little was ruled out.
        """
        z, norms, slack = self.projection.codes(queries)
        bounds, minima = self._lower_bounds(z)
        seeds = self._seeds(z, bounds, minima)
        lower, upper = pair_bounds(queries, self.references, self._norms, *_pairs(seeds))
        farthest = torch.minimum(upper.view_as(seeds).kthvalue(self.k, dim=1).values, farthest * (1 + RELATIVE_ERROR))
        # What is near enough has a code that is near enough, but for slack, and for the rounding of a product of d + 2
        # terms: they add up to at most (|z| + |w|)^2, and in whatever order they do. The product of levels is exact.
        terms = 0 if isinstance(self.projection, Levels) else len(self.codes.columns)
        rounding = (terms + 16) * _UNIT * (norms.sqrt() + self.codes.length).square()
        limits = (farthest.sqrt() + slack + self.codes.slack).square() + rounding - norms
        bounds.view(len(queries), -1).scatter_(1, seeds, torch.inf)
        cost = candidate_cost(queries, self.references)
        row, column, easy = self._candidates(bounds, minima, limits.float(), cost)
        others = pair_bounds(queries, self.references, self._norms, row, column)[0]
        row, column = (torch.cat(parts) for parts in zip(_pairs(seeds), (row, column), strict=True))
        near = torch.cat([lower, others]) <= farthest[row]
        row, order = row[near].sort(stable=True)
        column = column[near][order]
        distances = pair_distances(queries, self.references, row, column)
        table = _table(row, column, distances, (len(queries), self.k))
        found = sort_neighbors(queries, self.references, *table, self.k, ties=self.exhaustive.ties)
        return *found, easy

    def _lower_bounds(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``|w|^2 - 2 <z, w>`` for codes w, shape ``(Q, G, 32)``, and the minimum of each group."""
        length = self.codes.columns.shape[1]
        if len(self._memory) < len(z):
            self._memory = torch.empty(len(z), length)
        bounds = self._memory[: len(z)]
        minima = bounds.new_empty(len(z), length // _GROUP)
        rows = z if z.dtype == torch.int8 else torch.cat([-2 * z, torch.ones_like(z[:, :1])], dim=1)
        for start in range(0, length, _PRODUCT):  # in parts that are still in the cache when their minima are taken
            part, place = bounds[:, start : start + _PRODUCT], slice(start, start + _PRODUCT)
            if isinstance(self.projection, Levels):
                products = integer_products(rows, self.codes.columns[:, place])
                torch.add(self.codes.norms[place], products, alpha=-2 / self.projection.per_unit**2, out=part)
            else:
                torch.mm(rows, self.codes.columns[:, place], out=part)
            groups = slice(start // _GROUP, (start + _PRODUCT) // _GROUP)
            minima[:, groups] = part.unflatten(1, (-1, _GROUP)).amin(dim=2)
        return bounds.unflatten(1, (-1, _GROUP)), minima

    def _seeds(self, z: Tensor, bounds: Tensor, minima: Tensor) -> Tensor:
        """Return the references that are probably the nearest, shape ``(Q, S)`` with ``S >= k``.

        What a code leaves out of two images is about orthogonal, so their squared distance is probably its lower bound
        plus ``2 r r'``.
        """
        number = min(self.k + SPARE, len(self.references))
        groups = minima.topk(min(number + _GROUP, minima.shape[1]), largest=False, sorted=False).indices
        members = bounds.gather(1, groups[:, :, None].expand(-1, -1, _GROUP))
        probable = members + 2 * z[:, -1, None, None].float() * self.codes.rest[groups]
        best = probable.flatten(1).topk(number, largest=False, sorted=False).indices
        return (groups.gather(1, best // _GROUP) * _GROUP + best % _GROUP).sort(dim=1).values

    def _candidates(self, bounds: Tensor, minima: Tensor, limits: Tensor, cost: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pairs that are not ruled out, and which queries are left with not too many."""
        query, group = (minima <= limits[:, None]).nonzero(as_tuple=True)
        pair, member = (bounds[query, group] <= limits[query, None]).nonzero(as_tuple=True)
        row, column = query[pair], group[pair] * _GROUP + member
        easy = row.bincount(minlength=len(limits)) * cost <= len(self.references)
        kept = easy[row]
        return row[kept], column[kept], easy


def _pairs(seeds: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(seeds)).repeat_interleave(seeds.shape[1]), seeds.flatten()


def _table(row: Tensor, column: Tensor, distances: Tensor, least: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Arrange lists of neighbours, in ascending order of ``row``, as a table; infinite where a list is shorter."""
    counts = row.bincount(minlength=least[0])
    place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    table = distances.new_full((least[0], max(least[1], int(counts.amax()))), torch.inf)
    indices = torch.zeros_like(table, dtype=torch.int64)
    table[row, place], indices[row, place] = distances, column
    return table, indices
