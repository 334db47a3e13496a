"""Whether codes pay for a search, and how long they should be."""

import torch
from torch import Tensor

from lightning_iet.functional.exact_distances import RELATIVE_ERROR
from lightning_iet.functional.exhaustive_neighbors import float_rows
from lightning_iet.functional.neighbor_codes import Projection, principal_directions
from lightning_iet.functional.pruned_neighbors import PAIR_COST

__all__ = ["plan_projection"]

_LENGTHS = (64, 128, 256, 384)  # of codes that are tried
_SAMPLE = 2048  # references looked at …
_VALUES = 2**26  # … and numbers in them (256 MiB), at most
_QUERIES = 64  # queries looked at
_TRIAL_COST = 8 * _SAMPLE * _LENGTHS[-1]  # multiplications of a trial, per dimension
_PER_PAIR = 80  # what minima and memory cost per pair, in multiplications of a matrix product; measured
_DOUBLE = 2.5  # what a multiplication costs in float64, conversion included; measured
_GAIN = 0.8  # codes must promise this share of the cost, since the estimate has an error too


@torch.no_grad()
def plan_projection(queries: Tensor, references: Tensor, k: int) -> Projection | None:
    """Predict the cost of a search with codes of several lengths from a sample, and return the cheapest projection.

    Costs are counted in multiplications of a float32 matrix product on a CPU. The trial itself is made only where it
    costs less than a twentieth of the search.

    Args:
        queries: shape ``(Q, D)``.
        references: shape ``(N, D)``.
        k: neighbours that will be sought.

    Returns:
        The projection, or ``None`` where the exhaustive search is expected to be faster.

    Example:
        >>> plan_projection(torch.rand(10, 48), torch.rand(100, 48), k=3) is None  # too little to save
        True
    """
    (num_queries, dimension), num_references = queries.shape, len(references)
    if num_queries * num_references < 20 * _TRIAL_COST:
        return None
    sample = _evenly(references, min(_SAMPLE, _VALUES // max(1, dimension)))
    probes = _evenly(queries, _QUERIES)
    lengths = [length for length in _LENGTHS if length <= min(dimension, len(sample)) // 2]
    if not lengths:
        return None
    projection = principal_directions(sample, lengths[-1])
    near = _neighborhood(probes, sample, k / num_references)
    costs = {}
    for length in lengths:
        shorter = Projection(projection.mean, projection.basis[:, :length].contiguous())
        share = (torch.cdist(shorter.codes(probes).z, shorter.codes(sample).z).square() <= near).float().mean(dim=1)
        measured = (share * PAIR_COST).clamp(max=1).mean().item() + PAIR_COST * k / num_references
        codes = _DOUBLE * length * (1 / num_queries + 1 / num_references)
        costs[length] = codes + (length + _PER_PAIR) / dimension + measured
    best = min(costs, key=lambda length: costs[length])
    exhaustive = 1 + PAIR_COST * k / num_references
    if costs[best] > _GAIN * exhaustive:
        return None
    return Projection(projection.mean, projection.basis[:, :best].contiguous())


def _evenly(rows: Tensor, number: int) -> Tensor:
    number = min(number, len(rows))
    chosen = torch.arange(number, device=rows.device) * len(rows) // max(1, number)
    return float_rows(rows[chosen].cpu())


def _neighborhood(probes: Tensor, sample: Tensor, share: float) -> Tensor:
    """Return the squared distance within which about that share of the references lies, for each probe."""
    rank = max(1, round(share * len(sample)))
    distances = torch.cdist(probes, sample, compute_mode="use_mm_for_euclid_dist").square()
    return distances.kthvalue(rank, dim=1, keepdim=True).values * (1 + RELATIVE_ERROR)
