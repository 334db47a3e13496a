"""Nearest neighbours by one matrix product of all queries with all references: the search that any data allow."""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_iet.functional.checks import unit_interval

RELATIVE_ERROR = 1e-4
"""The relative error that a distance may have; see `pair_distances`."""
_UNIT = 2.0**-24  # the relative error of one float32 rounding
_UNDERFLOW = 1e-30  # squared distances below this lose bits in float32
_FLOATS = 2**20  # values (4 MiB) that are converted to float32 at a time
_DEPTH = 2048  # values of a row that go into one matrix product
_LEVELS_DEPTH = 1024  # the same for 8-bit levels less 128: sums of so many products, at most 2^14 each, are exact
_INTEGERS_DEPTH = 2**14  # the same in 32-bit integers, which hold sums of 2^17 such products …
_INTEGERS = 2**22  # … values (4 MiB) that are converted at a time …
INTEGERS_LEAST = 64  # … and values of a row below which it is not worth it …
INTEGERS_MOST = 2**17 - 1  # … and of which 32 bits hold every sum of products
_GROUP = 8  # values of a row of which the least is looked at first
_SPARE = 14  # candidates kept beyond k, so that rounding at the edge rarely asks for a second look
_PAIRS = 2**18  # candidates of all queries together, when some are searched again
# Distances of pairs
_SEGMENT = 128  # values that are summed in float32 …
_PAIR_ERROR = 1e-5  # … so that, in whatever order, 128 roundings of 6e-8, and a few more, err by less than this
_CACHED = 2**19  # differences (2 MiB) at a time: they stay in a core's cache
_TOGETHER = 2**18  # levels likewise, with what is made of them
_STEP = 2**14  # pairs whose sums are added up at a time
_WORTH = 2**16  # differences per query from which on a step for each query pays
_LAUNCHED = 2**25  # both on an accelerator, where many small steps cost more than memory


def float_rows(rows: Tensor) -> Tensor:
    """Return rows in float32, uint8 divided by 255; the same tensor if it is float32 already."""
    return unit_interval(rows).float()


def float_slices(rows: Tensor) -> Iterator[Tensor]:
    """Yield all rows in float32, a slice at a time, so that there is never a float copy of all of them."""
    return map(float_rows, rows.split(_slice_length(rows)))


def _slice_length(rows: Tensor) -> int:
    return max(1, _FLOATS // max(1, rows.shape[1]))


@torch.no_grad()
def squared_norms(rows: Tensor) -> Tensor:
    """Return the squared l2 norm of every row, shape ``(N,)``, correctly rounded to float32.

    Summed in float64: in float32 the norm of an image of one colour may be off by thousands of roundings, since all of
    them go the same way.
    """
    norms = torch.empty(len(rows), device=rows.device)
    for part, out in zip(float_slices(rows), norms.split(_slice_length(rows)), strict=True):
        out.copy_(torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square_())
    return norms


class ExhaustiveSearch(NamedTuple):
    r"""The ``k`` nearest of a set of references, found by matrix products.

    Estimates :math:`\lVert x \rVert^2 + \lVert y \rVert^2 - 2 \langle x, y \rangle` propose ``k`` candidates and a few
    more; distances by differences decide among them. A query for which :func:`rounding` cannot exclude that a true
    neighbour was not proposed is searched again with more candidates. Between 8-bit images the product itself is exact,
    and nothing has to be measured.

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
    squares: Tensor | None = None  # of 8-bit references: level_moments(references)[1], where it is at hand

    def nearest(
        self, queries: Tensor, width: int | None = None, squares: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the squared distances, float32, and indices of the ``k`` nearest, among ``width > k`` candidates.

        Of 8-bit queries ``squares`` is ``level_moments(queries)[1]``, where it is at hand.
        """
        if queries.dtype == self.references.dtype == torch.uint8:
            return self._nearest_levels(queries, level_moments(queries)[1] if squares is None else squares)
        width = min(width or self.k + _SPARE, len(self.references))
        norms = squared_norms(queries)[:, None]
        estimates, indices = self._candidates(queries, width)
        estimates = (estimates + norms).clamp_(min=0)
        distances = self._measured(queries, norms, estimates, indices)
        distances, indices = sort_neighbors(queries, self.references, distances, indices, self.k, ties=self.ties)
        if width < len(self.references):
            farthest = distances[:, -1:] * (1 + RELATIVE_ERROR)
            reach = farthest + rounding(_lengths(norms, farthest), queries.shape[1])
            open_ = (reach >= estimates[:, -1:]).squeeze(1).nonzero().squeeze(1)
            # Not empty where many references are within rounding of the farthest, as in a set full of duplicates.
            for part in open_.split(max(1, _PAIRS // (4 * width))) if len(open_) else ():
                distances[part], indices[part] = self.nearest(queries[part], 4 * width)
        return distances, indices

    def _candidates(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return the ``width`` smallest of ``|y|^2 - 2 <x, y>`` for every row x, ascending, and their indices."""
        best = self.norms.new_empty(len(rows), 0)
        indices = torch.empty_like(best, dtype=torch.int64)
        memory = best.new_empty(len(rows), min(self.chunk_size, len(self.references)))
        for start in range(0, len(self.references), self.chunk_size):
            block = slice(start, start + self.chunk_size)
            norms = self.norms[block]
            estimates = _partial_distances(rows, self.references[block], norms, out=memory[:, : len(norms)])
            top, positions = _smallest(estimates, min(width, len(norms)))
            if start == 0:
                best, indices = top, positions
                continue
            best, indices = torch.cat([best, top], dim=1), torch.cat([indices, positions + start], dim=1)
            best, positions = best.topk(min(width, best.shape[1]), largest=False)
            indices = indices.gather(1, positions)
        return best, indices

    def _nearest_levels(self, queries: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Find the nearest among 8-bit images, in order of the float32 distance and the index."""
        best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        squares = level_moments(self.references)[1] if self.squares is None else self.squares
        for start in range(0, len(self.references), self.chunk_size):
            block = slice(start, start + self.chunk_size)
            distances = level_distances(queries, self.references[block], (own, squares[block])).float()
            # Numbers that are not negative are ordered as their bits are: one integer holds distance and index.
            keys = distances.view(torch.int32).long().bitwise_left_shift_(32)
            keys += torch.arange(start, start + keys.shape[1], device=keys.device)
            best = torch.cat([best, keys.topk(min(self.k, keys.shape[1]), largest=False).values], dim=1)
            best = best.topk(min(self.k, best.shape[1]), largest=False).values
        return (best >> 32).int().view(torch.float32), best & (2**32 - 1)

    def _measured(self, queries: Tensor, norms: Tensor, estimates: Tensor, indices: Tensor) -> Tensor:
        """Measure the candidates by differences; without ``ties`` only those whose value rounding leaves open."""
        open_ = torch.ones_like(indices, dtype=torch.bool)
        if not self.ties:
            open_ = RELATIVE_ERROR * estimates < _usual_rounding(_lengths(norms, estimates), queries.shape[1])
            open_[:, :2] = True  # few, and the two whose ratio is held against a threshold
        row, column = open_.nonzero(as_tuple=True)
        measured = pair_distances(queries, self.references, row, indices[row, column])
        return estimates.double().index_put((row, column), measured)


def _partial_distances(rows: Tensor, block: Tensor, norms: Tensor, out: Tensor) -> Tensor:
    """Write ``|y|^2 - 2 <x, y>``; the term ``|x|^2`` does not change the order, and is added to who stays.

    Rows are summed in equal parts of at most ``_DEPTH`` values, which bounds the rounding. A part is converted to
    float32 at a time, for all ``rows`` together, so that references are converted once whatever the size of an image.
    """
    parts = _parts(rows.shape[1])
    out.copy_(norms.expand_as(out))
    for left, right in zip(rows.tensor_split(parts, dim=1), block.tensor_split(parts, dim=1), strict=True):
        x, step = float_rows(left), len(block) if block.dtype == torch.float32 else _slice_length(right)
        for y, columns in zip(right.split(step), out.split(step, dim=1), strict=True):
            columns.addmm_(x, float_rows(y).T, alpha=-2)
    return out


def _smallest(values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return that many of the smallest values of each row, ascending, and their columns.

    Long rows are taken as groups of eight values: the smallest lie in those groups whose least values are the
    smallest, and these are found in half the time that the search among all values takes.
    """
    groups = values.shape[1] // _GROUP
    if groups < 4 * number:
        return values.topk(number, largest=False)
    least = values[:, : groups * _GROUP].unflatten(1, (_GROUP, groups)).amin(dim=1)
    chosen = least.topk(number, largest=False, sorted=False).indices[:, None]
    columns = (chosen + groups * torch.arange(_GROUP, device=values.device)[:, None]).flatten(1)
    if rest := values.shape[1] % _GROUP:
        last = torch.arange(groups * _GROUP, values.shape[1], device=values.device)
        columns = torch.cat([columns, last.expand(len(values), rest)], dim=1)
    found, positions = values.gather(1, columns).topk(number, largest=False)
    return found, columns.gather(1, positions)


def level_distances(queries: Tensor, references: Tensor, squares: tuple[Tensor, Tensor] | None = None) -> Tensor:
    r"""Return the squared l2 distances of all pairs of 8-bit images, exactly but for one rounding.

    Of levels less 128, :math:`\lVert x \rVert^2 + \lVert y \rVert^2 - 2 \langle x, y \rangle` is made of integers.
    Their products are summed in 32-bit integers on processors that have instructions for it, several times as fast as
    a float32 product; elsewhere in float32, 1024 at a time, which is exact too. Sums of these are float64.

    Args:
        queries: shape ``(Q, D)``, uint8 (meaning value / 255).
        references: shape ``(N, D)``, likewise, on the same device.
        squares: ``level_moments(...)[1]`` of queries and of references, where they are at hand.

    Returns:
        Shape ``(Q, N)``, float64.

    Example:
        >>> rows = torch.tensor([[0, 255], [0, 0]], dtype=torch.uint8)
        >>> level_distances(rows, rows)
        tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64)
    """
    integers = queries.shape[1] >= INTEGERS_LEAST and queries.device.type == "cpu" and has_integer_products()
    depth, values = (_INTEGERS_DEPTH, _INTEGERS) if integers else (_LEVELS_DEPTH, _FLOATS)
    parts = _parts(queries.shape[1], depth)
    distances = torch.zeros(len(queries), len(references), dtype=torch.float64, device=queries.device)
    for left, right in zip(queries.tensor_split(parts, dim=1), references.tensor_split(parts, dim=1), strict=True):
        x, number = _centred(left, integers), max(1, -(-right.numel() // values))
        for part, out in zip(right.tensor_split(number), distances.tensor_split(number, dim=1), strict=True):
            y = _centred(part, integers).T
            out.sub_(integer_products(x, y) if integers else x @ y, alpha=2)
    of_queries, of_references = squares or (level_moments(queries)[1], level_moments(references)[1])
    return distances.add_(of_queries[:, None]).add_(of_references).div_(255**2)


def _centred(levels: Tensor, integers: bool) -> Tensor:
    """Return levels less 128, as 8-bit integers or as float32."""
    centred = levels.view(torch.int8).bitwise_xor(-128)  # flips the highest bit: less work than a difference
    return centred if integers else centred.float()


def integer_products(one: Tensor, other: Tensor) -> Tensor:
    """Return the matrix product of 8-bit integers as 32-bit ones, exactly, where :func:`has_integer_products`.

    Args:
        one: shape ``(M, K)``, int8, ``K`` at most :data:`INTEGERS_MOST`.
        other: shape ``(K, N)``, likewise; fastest where its columns lie in memory one after the other.
    """
    (rows, _), (_, columns) = one.shape, other.shape
    # Of a single row, or column, torch's product may be wrong: pytorch/pytorch#195066.
    one, other = one if rows > 1 else one.repeat(2, 1), other if columns > 1 else other.repeat(1, 2)
    return torch._int_mm(one, other)[:rows, :columns]


def has_integer_products() -> bool:
    """Tell whether torch multiplies matrices of 8-bit integers on this CPU, fast and exactly.

    Without instructions for it oneDNN may cut sums of products off at 16 bits, and torch's own loop is slow. So only
    where oneDNN is on, there are such instructions, and the largest and smallest products are right.
    """
    is_on = getattr(torch._C, "_get_mkldnn_enabled", lambda: True)  # not in every torch
    if not (torch.backends.mkldnn.is_available() and is_on()):
        return False
    try:
        return "AVX512" in torch.backends.cpu.get_cpu_capability() and _multiplies_exactly()
    except RuntimeError:  # no product for this CPU, or tensors without values, as under FakeTensorMode: asked again
        return False


@cache
def _multiplies_exactly() -> bool:
    levels = torch.tensor([-128, 127, -1, 0], dtype=torch.int8, device="cpu").repeat_interleave(256)
    x = torch.stack([levels, levels.flip(0), torch.full_like(levels, -128)]).repeat(11, 4)  # 33 rows of 4096
    y = torch.cat([x, levels.view(1, -1).roll(1).repeat(1, 4)])
    try:
        return torch.equal(torch._int_mm(x, y.T).long(), x.long() @ y.long().T)
    except AttributeError:  # no such function in this torch
        return False


def level_moments(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of ``level - 128``, and of its squares, over the last dimension, exactly.

    Args:
        levels: uint8, shape ``(..., D)``.

    Returns:
        Float64, shape ``(...)`` each.

    Example:
        >>> level_moments(torch.tensor([[128, 130], [128, 127]], dtype=torch.uint8))
        (tensor([ 2., -1.], dtype=torch.float64), tensor([4., 1.], dtype=torch.float64))
    """
    rows = levels.flatten(0, -2)
    sums, squares = torch.zeros(2, len(rows), dtype=torch.float64, device=levels.device)
    # Few values at a time: they stay in a core's cache. Of 1024 squares of at most 2^14 the sum is exact in float32.
    depth = max(1, min(rows.shape[1], _LEVELS_DEPTH))
    together = _TOGETHER if levels.device.type == "cpu" else _LAUNCHED
    width = depth * max(1, min(rows.shape[1], together) // depth)
    step = max(1, together // width)
    ones = torch.ones(depth, device=levels.device)
    for part, *out in zip(rows.split(step), sums.split(step), squares.split(step), strict=True):
        for piece in part.split(width, dim=1):
            values = _centred(piece, integers=False)
            if missing := -piece.shape[1] % depth:
                values = torch.nn.functional.pad(values, (0, missing))
            runs = values.reshape(values.numel() // depth, depth)
            # Products of matrices take less than half the time that squares and their sums do.
            pairs, last = runs[: len(runs) // 2 * 2].view(-1, 2, depth), runs[len(runs) // 2 * 2 :]
            products = torch.bmm(pairs, pairs.mT).diagonal(dim1=1, dim2=2).flatten()
            products = torch.cat([products, (last @ last.T).flatten()])
            for total, found in zip(out, (runs @ ones, products), strict=True):
                total += found.view(len(piece), values.shape[1] // depth).sum(dim=1, dtype=torch.float64)
    return sums.view(levels.shape[:-1]), squares.view(levels.shape[:-1])


def _parts(dimension: int, depth: int = _DEPTH) -> int:
    return max(1, -(-dimension // max(1, depth)))


def rounding(lengths: Tensor, dimension: int, *, depth: int = _DEPTH) -> Tensor:
    """Bound the error of the estimate ``|x|^2 + |y|^2 - 2 <x, y>``, given at least ``|x| + |y|``.

    A sum of n products, in whatever order, has an error of at most ``n u |x| |y|`` with ``u = 2^-24`` (Higham, Accuracy
    and Stability of Numerical Algorithms, 2nd ed., section 3.1; the terms in u^2 are within the 16 below). A product of
    ``depth`` n, its addition to p - 1 others, and a handful of roundings of values of at most ``(|x| + |y|)^2`` make
    ``(n + p + 16) u`` of twice ``|x| |y| <= (|x| + |y|)^2 / 4``.
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


@torch.no_grad()
def pair_distances(queries: Tensor, references: Tensor, i: Tensor, j: Tensor, *, precise: bool = False) -> Tensor:
    r"""Return :math:`\lVert x_{i} - y_{j} \rVert^2` for a list of pairs, shape ``(P,)``, float64.

    Differences and sums of up to 128 squares are float32, which bounds the relative error by 1e-5 in whatever order a
    device sums; the sums of those are float64. Of two uint8 images all sums are of integers, and exact: the same
    numbers as those of :func:`level_distances`.

    Args:
        queries: shape ``(Q, D)``, uint8 (meaning value / 255) or floating point.
        references: shape ``(N, D)``, likewise, on the same device.
        i: indices of queries, shape ``(P,)``; fastest if ascending.
        j: indices of references, shape ``(P,)``.
        precise: compute in float64 throughout, which tells ties from near ties, at three times the cost.
    """
    levels = queries.dtype == references.dtype == torch.uint8
    wide = precise or torch.float64 in (queries.dtype, references.dtype)
    dimension = queries.shape[1]
    step = max(1, (_CACHED if i.device.type == "cpu" else _LAUNCHED) // max(1, dimension))
    # Two buffers for all steps: fresh memory for each would cost more than the arithmetic.
    size = (min(step, len(i)), dimension)
    buffers = [torch.empty(size, dtype=torch.float64 if wide else torch.float32, device=i.device) for _ in range(2)]
    segment = next((size for size in range(min(_SEGMENT, dimension), 1, -1) if dimension % size == 0), 1)
    roots = buffers[0].new_empty(len(i), dimension // segment)  # of sums of squares; of levels the sums themselves
    lengths, alone = _steps(i, step, dimension)
    for out, a, b in zip(roots.split(lengths), i.split(lengths), j.split(lengths), strict=True):
        x = _gather(queries, a[:1] if alone else a, buffers[0], levels=levels)
        differences = _gather(references, b, buffers[1], levels=levels).sub_(x)
        if levels:  # 128 squares of at most 255² are less than 2^24
            torch.sum(differences.square_().view(len(b), -1, segment), dim=2, out=out)
        else:
            torch.linalg.vector_norm(differences.view(len(b), -1, segment), dim=2, out=out)
    if levels:
        return roots.sum(dim=1, dtype=torch.float64) / 255**2
    return torch.cat([part.double().square_().sum(dim=1) for part in roots.split(_STEP)])


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
    """Return the ``k`` nearest of some candidates: by distance, and by index where distances are equal.

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
