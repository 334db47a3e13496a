"""Bounds of the squared distances of chosen pairs, from scalar products: half the cost of measuring them."""

import warnings

import torch
from torch import Tensor

from lightning_iet.functional.exact_distances import RELATIVE_ERROR, pair_distances
from lightning_iet.functional.exhaustive_neighbors import rounding, squared_norms

__all__ = ["pair_bounds"]


@torch.no_grad()
def pair_bounds(queries: Tensor, references: Tensor, norms: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    r"""Bound :math:`\lVert x_i - y_j \rVert^2` from below and above, on a CPU.

    Float32 images are compared by :math:`\lVert x \rVert^2 + \lVert y \rVert^2 - 2 \langle x, y \rangle` and the
    rounding of that; others are measured.

    Args:
        queries: shape ``(Q, D)``.
        references: shape ``(N, D)``.
        norms: ``squared_norms(references)``, shape ``(N,)``.
        i: indices of queries, ascending, shape ``(P,)``.
        j: indices of references, shape ``(P,)``.

    Returns:
        Lower and upper bounds, float64, shape ``(P,)`` each.

    Example:
        >>> rows = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
        >>> lower, upper = pair_bounds(rows, rows, squared_norms(rows), torch.tensor([0]), torch.tensor([1]))
        >>> lower <= 1, upper - lower < 1e-4
        (tensor([True]), tensor([True]))
    """
    if not queries.dtype == references.dtype == torch.float32:
        distances = pair_distances(queries, references, i, j)
        return distances * (1 - RELATIVE_ERROR), distances * (1 + RELATIVE_ERROR)
    x, y = squared_norms(queries).double()[i], norms.double()[j]
    estimates = x + y - 2 * _products(queries, references, i, j).double()
    error = rounding(x.sqrt() + y.sqrt(), queries.shape[1], depth=queries.shape[1])
    return estimates - error, estimates + error


def _products(queries: Tensor, references: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Return ``<x_i, y_j>``. Torch computes chosen products without gathering their rows only as a sparse matrix."""
    starts = torch.zeros(len(queries) + 1, dtype=torch.int64)
    starts[1:] = i.bincount(minlength=len(queries)).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)  # "in beta", "checks are disabled"
        chosen = torch.sparse_csr_tensor(starts, j, torch.zeros(len(j)), size=(len(queries), len(references)))
        return torch.sparse.sampled_addmm(chosen, queries, references.T, beta=0.0).values()
