"""Density and coverage of generated images."""

from torch import Tensor

from lightning_iet.functional.checks import check_features
from lightning_iet.functional.precision_recall import neighborhood_counts, squared_radii


def density_coverage(generated: Tensor, real: Tensor, *, k: int = 5) -> dict[str, Tensor]:
    r"""Return how densely generated images lie among real ones, and the share of real ones that have one nearby.

    .. math::
        \mathrm{density} = \frac{1}{kM} \sum_{i,j} \Big[\lVert g_i - r_j \rVert < \rho_k(r_j)\Big], \qquad
        \mathrm{coverage} = \frac1N \sum_{j} \Big[\exists i : \lVert g_i - r_j \rVert < \rho_k(r_j)\Big],

    where :math:`\rho_k(r_j)` is the distance of :math:`r_j` to its ``k``-th nearest other real image (Naeem et al.,
    ICML 2020, arXiv:2002.09797; strictly less, as in the authors' code, so that a set has density 1 in itself).

    Args:
        generated: features, shape ``(M, D)``.
        real: features, shape ``(N, D)``, ``N > k``.
        k: the neighbour whose distance is the radius; 5 as published.

    Returns:
        ``"density"``, at least 0, may exceed 1, and ``"coverage"`` in [0, 1]; 0-d tensors, float64.

    Raises:
        TypeError, ValueError: as :func:`~lightning_iet.functional.checks.check_features`.
        ValueError: if there are no generated images, or no more than ``k`` real ones.

    Example:
        >>> import torch
        >>> real = torch.arange(8.0)[:, None]
        >>> density_coverage(torch.tensor([[0.0], [1.0], [2.0], [50.0]]), real, k=1)
        {'density': tensor(0.7500, dtype=torch.float64), 'coverage': tensor(0.3750, dtype=torch.float64)}
    """
    check_features(generated=generated, real=real)
    if len(generated) == 0:
        raise ValueError("Argument `generated` expected at least one image, but got none. Draw some first.")
    of_generated, of_real = neighborhood_counts(generated, real, squared_radii(real, k), closed=False)
    return {"density": of_generated.double().mean() / k, "coverage": (of_real > 0).double().mean()}
