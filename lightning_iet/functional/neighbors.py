"""Exact nearest neighbours among images, in memory that does not grow with the size of either set."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_iet.functional.checks import image_rows
from lightning_iet.functional.exhaustive_neighbors import (
    INTEGERS_LEAST,
    INTEGERS_MOST,
    RELATIVE_ERROR,
    ExhaustiveSearch,
    float_rows,
    has_integer_products,
    level_moments,
    merge_nearest,
    squared_norms,
)
from lightning_iet.functional.pruned_neighbors import (
    PAIR_COST,
    SPARE,
    Levels,
    Projection,
    PrunedSearch,
    candidate_cost,
    principal_directions,
)
from lightning_iet.utilities.devices import full_precision

_CHUNK = 8192  # references per top-k: a wide top-k costs far less than many narrow ones
_BLOCK = 2**29  # bytes of the queries that pass over the references together …
_TOGETHER = 1024, 512  # … and how many queries at most, without and with codes
_CODED = 2**16  # references that are coded at a time: their lower bounds for a block of queries take 128 MiB …
_CODES = 2**28  # … and bytes of their levels, at most
_MOVED = 2**28  # bytes of references that are on another device at a time
_CHECKED = 2**25  # values that are checked at a time
# The trial by which the length of codes is chosen
_LENGTHS = (64, 128, 256, 384)  # of codes that are tried
_SAMPLE = 2048  # references looked at …
_VALUES = 2**26  # … and numbers in them (256 MiB), at most
_QUERIES = 64  # queries looked at
_TRIAL_COST = 8 * _SAMPLE * _LENGTHS[-1]  # multiplications of a trial, per dimension
_PER_PAIR = 80  # what minima and memory cost per pair, in multiplications of a matrix product; measured
_DOUBLE = 2.5  # what a multiplication costs in float64, conversion included; measured
_LEVELS = 1.5  # what a product of 8-bit images costs that needs no measuring, in float32 products; measured …
_INTEGER_LEVELS = 0.4  # … and where 8-bit integers are multiplied: 0.23 among 4,096 references, 0.45 among 32,768
_INTEGERS = 0.12  # what a product of 8-bit integers costs, in float32 products; measured
_WORTH_TRYING = 0.1  # of all: what projections may save over levels, for their trial takes longer
_ROUNDING = 100  # what rounding a value to a level costs, in multiplications; measured
_GAIN = 0.8  # codes must promise this share of the cost, since the estimate has an error too

Progress = Callable[[int], None]


def nearest_neighbors(
    queries: Tensor,
    references: Tensor,
    k: int,
    *,
    chunk_size: int = _CHUNK,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Find the ``k`` nearest references of every query, exactly, in squared l2 distance.

    .. math:: D_{ij} = \lVert x_i - y_j \rVert^2
        = \lVert x_i \rVert^2 + \lVert y_j \rVert^2 - 2 \langle x_i, y_j \rangle

    The right-hand side is one matrix product, but it cancels where :math:`D` is small against the norms, which is just
    where copies live. So it only proposes candidates, with a bound of its rounding; what is returned was computed as
    :math:`\sum (x - y)^2`. Between 8-bit images the product is one of integers: exact. On a CPU, large searches first
    rule out most pairs by short codes of the images, where that pays (see
    :mod:`~lightning_iet.functional.pruned_neighbors`): on photographs it does.

    Inputs are read in slices, and may be memory-mapped. Beside them and the result, memory does not grow with either
    set: it was 1.3 GiB for 65,536 among 50,000 images of 3x32x32.

    Args:
        queries: shape ``(Q, ...)``, uint8 or floating point in [0, 1].
        references: shape ``(N, ...)``, the same shape per image; the dtype may differ.
        k: neighbours per query, ``1 <= k <= N``.
        chunk_size: references per block of estimates. It bounds the memory and does not change the result.
        device: where to compute, by default where the queries are. Slices of the inputs are moved there.
        progress: called now and then with the number of queries that are done. Where references are searched in
            several parts, a query counts in parts.

    Returns:
        Squared distances, float32, shape ``(Q, k)``, ascending, and the references' indices, int64, shape ``(Q, k)``,
        where the queries are. Their relative error is below 1e-4. Of references at the same distance (the same float32
        number) the one with the lowest index comes first.

    Raises:
        TypeError: as :func:`~lightning_iet.functional.checks.image_rows`.
        ValueError: as :func:`~lightning_iet.functional.checks.image_rows`; if the images' shapes differ, or ``k`` or
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
    rows = _checked_rows(queries, "queries"), _checked_rows(references, "references")
    if not 1 <= k <= len(references):
        raise ValueError(
            f"Argument `k` expected a number from 1 to the number of references, {len(references)}, but got {k}. "
            "Pass a smaller `k` or more references."
        )
    if chunk_size < 1:
        raise ValueError(f"Argument `chunk_size` expected a positive number, but got {chunk_size}. Leave it out.")
    return search_rows(*rows, k, chunk_size=chunk_size, device=device, progress=progress)


def _checked_rows(images: Tensor, name: str) -> Tensor:
    """Check images slice by slice, and flatten them without a copy in another dtype."""
    sliceable = isinstance(images, Tensor) and images.ndim > 1
    for part in images.split(max(1, _CHECKED // max(1, images[:1].numel()))) if sliceable else (images,):
        image_rows(part, name=name)
    return images.detach().flatten(1)


@torch.no_grad()
def search_rows(
    queries: Tensor,
    references: Tensor,
    k: int,
    *,
    norms: Tensor | None = None,
    squares: Tensor | None = None,
    own_squares: Tensor | None = None,
    ties: bool = True,
    chunk_size: int = _CHUNK,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Do the work of :func:`nearest_neighbors` on rows that have been checked.

    Args:
        queries: shape ``(Q, D)``, uint8 or floating point; pixels in [0, 1], or features.
        references: shape ``(N, D)``, likewise.
        k: neighbours per query, ``1 <= k <= N``.
        norms: ``squared_norms(references)``, shape ``(N,)``, where it is at hand from an earlier search.
        squares: likewise ``level_moments(references)[1]``, which takes its place where both sets are uint8.
        own_squares: likewise ``level_moments(queries)[1]``.
        ties: put neighbours in the right order also where their distances differ by a rounding error. Where only the
            distances matter, leave it off and save time.
        chunk_size: as :func:`nearest_neighbors`, and so are ``device`` and ``progress``.
        device: where to compute.
        progress: called with the number of queries that are done.

    Returns:
        Squared distances and indices, shape ``(Q, k)`` each.

    Example:
        >>> rows = image_rows(torch.tensor([[0], [51], [255]], dtype=torch.uint8))
        >>> search_rows(rows[:1], rows, k=3)[0]
        tensor([[0.0000, 0.0400, 1.0000]])
    """
    target = torch.device(device) if device is not None else queries.device
    projection = plan_projection(queries, references, k) if target.type == "cpu" else None
    distances = torch.full((len(queries), k), torch.inf, device=queries.device)
    indices = torch.full_like(distances, -1, dtype=torch.int64)
    parts = _parts(references, k, target, projection)
    done, levels = 0, queries.dtype == references.dtype == torch.uint8
    with full_precision(target.type):
        for part in parts:
            moved = references[part].to(target)
            if levels:  # whose norms are not needed
                lengths = given = level_moments(moved)[1] if squares is None else squares[part].to(target)
            else:
                lengths, given = squared_norms(moved) if norms is None else norms[part].to(target), None
            search = ExhaustiveSearch(moved, lengths, min(k, len(moved)), ties, chunk_size, given)
            for rows, *found in _search(queries, search, projection, distances[:, -1], own_squares):
                near, index = (tensor.to(queries.device) for tensor in found)
                if len(parts) == 1:  # nothing to merge with; at an infinite distance is no neighbour
                    distances[rows], indices[rows] = near, index.masked_fill(near == torch.inf, -1)
                else:
                    before = distances[rows], indices[rows]
                    distances[rows], indices[rows] = merge_nearest(before, (near, index + part.start), k=k)
                done += len(rows)
                if progress is not None:
                    progress(done // len(parts))
    return distances, indices


def _parts(references: Tensor, k: int, target: torch.device, projection: Projection | Levels | None) -> list[slice]:
    """Cut the references into parts that are searched one after the other."""
    length = len(references)
    if projection is not None:
        length = _coded(k, references.shape[1] if isinstance(projection, Levels) else 0)
    if references.device != target:
        length = min(length, max(k, _MOVED // max(1, references[:1].nbytes)))
    return [slice(start, min(start + length, len(references))) for start in range(0, len(references), length)]


def _coded(k: int, num_bytes: int) -> int:
    """Return how many references are coded at a time, of which each takes so many bytes."""
    return max(2 * k, min(_CODED, _CODES // max(1, num_bytes)))


def _search(
    queries: Tensor,
    search: ExhaustiveSearch,
    projection: Projection | Levels | None,
    farthest: Tensor,
    squares: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield indices of some queries, and the distances and indices of their nearest among a part of the references."""
    target = search.references.device
    every = torch.arange(len(queries), device=queries.device)

    def exhaustive(rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        own = None if squares is None else squares[rows].to(target)
        return search.nearest(queries[rows].to(target), squares=own)

    if projection is None:
        step = _block_length(queries, coded=False)
        for part in (slice(start, start + step) for start in range(0, len(queries), step)):  # no copies
            yield every[part], *exhaustive(part)
        return
    pruned, hard = PrunedSearch(search, projection), []
    for rows in every.split(_block_length(queries, coded=True)):
        *found, easy = pruned.nearest(queries[rows].to(target), farthest[rows].to(target))
        easy = easy.to(rows.device)
        hard.append(rows[~easy])
        yield rows[easy], found[0][easy], found[1][easy]
    for rows in torch.cat(hard).split(_block_length(queries, coded=False)):
        yield rows, *exhaustive(rows)


def _block_length(queries: Tensor, *, coded: bool) -> int:
    return max(1, min(_TOGETHER[coded], _BLOCK // max(1, queries[:1].nbytes)))


@torch.no_grad()
def plan_projection(queries: Tensor, references: Tensor, k: int) -> Projection | Levels | None:
    """Return what to take codes from so that a search for ``k`` neighbours costs least; ``None`` if it is without them.

    The cost with codes of several lengths, and with levels, is estimated from a sample, and counted in multiplications
    of a float32 matrix product on a CPU. The trial is made only where it costs less than a twentieth of the search.
    """
    (num_queries, dimension), num_references = queries.shape, len(references)
    levels = queries.dtype == references.dtype == torch.uint8
    if levels and dimension >= INTEGERS_LEAST and has_integer_products():
        exhaustive, pairs = _INTEGER_LEVELS, _INTEGER_LEVELS * num_queries * num_references
    else:
        exhaustive = _LEVELS if levels else 1 + PAIR_COST * k / num_references
        pairs = num_queries * num_references
    if pairs < 20 * _TRIAL_COST:
        return None
    sample = _evenly(references, min(_SAMPLE, _VALUES // max(1, dimension)))
    probes = _evenly(queries, _QUERIES)
    near = _neighborhood(probes, sample, k / num_references)
    candidate = candidate_cost(queries, references)

    def others(likely: Tensor, length: int) -> float:  # pairs that codes leave, seeds in each part, and neighbours
        left = (likely.float().mean(dim=1) * candidate).clamp(max=1).mean().item()
        return left + candidate * (k + SPARE) / length + PAIR_COST * k / num_references

    costs: list[tuple[float, Projection | Levels]] = []
    if is_rounding := not levels and INTEGERS_LEAST <= dimension <= INTEGERS_MOST and has_integer_products():
        rounded, length = Levels.of(sample), min(num_references, _coded(k, dimension))
        one, other = rounded.codes(probes), rounded.codes(sample)
        apart = torch.cdist(one.z.float(), other.z.float()) / rounded.per_unit - one.slack[:, None] - other.slack
        likely = apart.clamp(min=0).square() <= near
        coding = _ROUNDING * (1 / num_queries + 1 / length)
        costs.append((coding + _INTEGERS + _PER_PAIR / dimension + others(likely, length), rounded))
    widths = [width for width in _LENGTHS if width <= min(dimension, len(sample)) // 2]
    if widths and not (is_rounding and _INTEGERS - widths[0] / dimension < _WORTH_TRYING):
        whole, length = principal_directions(sample, widths[-1]), min(num_references, _coded(k, 0))
        for width in widths:
            shorter = Projection(whole.mean, whole.basis[:, :width].contiguous())
            likely = torch.cdist(shorter.codes(probes).z, shorter.codes(sample).z).square() <= near
            coding = _DOUBLE * width * (1 / num_queries + 1 / length)
            costs.append((coding + (width + _PER_PAIR) / dimension + others(likely, length), shorter))
    cost, best = min(costs, key=lambda found: found[0], default=(torch.inf, None))
    return best if cost <= _GAIN * exhaustive else None


def _evenly(rows: Tensor, number: int) -> Tensor:
    """Return so many rows, spread evenly over all, in float32 on the CPU."""
    number = min(number, len(rows))
    chosen = torch.arange(number, device=rows.device) * len(rows) // max(1, number)
    return float_rows(rows[chosen].cpu())


def _neighborhood(probes: Tensor, sample: Tensor, share: float) -> Tensor:
    """Return the squared distance within which about that share of the references lies, for each probe."""
    rank = max(1, round(share * len(sample)))
    distances = torch.cdist(probes, sample, compute_mode="use_mm_for_euclid_dist").square()
    return distances.kthvalue(rank, dim=1, keepdim=True).values * (1 + RELATIVE_ERROR)
