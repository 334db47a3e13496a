"""Improved precision and recall of generated images."""

from torch import Tensor

from lightning_iet.functional.balls import ball_counts, squared_radii
from lightning_iet.functional.checks import check_features

__all__ = ["precision_recall"]


def precision_recall(generated: Tensor, real: Tensor, *, k: int = 3) -> dict[str, Tensor]:
    r"""Return the share of generated images among the real ones, and of real images among the generated ones.

    .. math::
        \mathrm{precision} = \frac1M \sum_{i} \Big[\exists j : \lVert g_i - r_j \rVert \le \rho_k(r_j)\Big], \qquad
        \mathrm{recall} = \frac1N \sum_{j} \Big[\exists i : \lVert r_j - g_i \rVert \le \rho_k(g_i)\Big],

    where :math:`\rho_k(r_j)` is the distance of :math:`r_j` to its ``k``-th nearest other real image, and
    :math:`\rho_k(g_i)` likewise among the generated ones (Kynkäänniemi et al., NeurIPS 2019, arXiv:1904.06991).

    Args:
        generated: features, shape ``(M, D)``, ``M > k``.
        real: features, shape ``(N, D)``, ``N > k``.
        k: the neighbour that gives a ball its radius; 3 as published.

    Returns:
        ``"precision"`` and ``"recall"``, 0-d tensors in [0, 1], float64.

    Raises:
        TypeError: as :func:`~lightning_iet.functional.checks.check_features`.
        ValueError: as :func:`~lightning_iet.functional.checks.check_features`; if a set has no more than ``k``
            images.

    Example:
        >>> import torch
        >>> real = torch.arange(8.0)[:, None]
        >>> precision_recall(torch.tensor([[0.0], [1.0], [2.0], [50.0]]), real, k=1)
        {'precision': tensor(0.7500, dtype=torch.float64), 'recall': tensor(1., dtype=torch.float64)}
    """
    check_features(generated=generated, real=real)
    in_real, _ = ball_counts(generated, real, squared_radii(real, k), closed=True)
    in_generated, _ = ball_counts(real, generated, squared_radii(generated, k), closed=True)
    return {"precision": (in_real > 0).double().mean(), "recall": (in_generated > 0).double().mean()}
