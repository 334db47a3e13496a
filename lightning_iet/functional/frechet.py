"""Fréchet distance of two normal distributions, in float64."""

import torch
from torch import Tensor

__all__ = ["frechet_distance", "moments", "moments_of_sums"]


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance (with ``N - 1``) of features.

    Args:
        features: shape ``(N, D)``, floating point.

    Returns:
        Shapes ``(D,)`` and ``(D, D)``, float64.

    Example:
        >>> moments(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
        (tensor([1., 2.], dtype=torch.float64), tensor([[2., 4.],
                [4., 8.]], dtype=torch.float64))
    """
    rows = features.double()
    mean = rows.mean(dim=0)
    centred = rows - mean
    return mean, centred.T @ centred / (len(rows) - 1)


def moments_of_sums(count: Tensor, total: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance from sums that add up over batches and processes.

    Args:
        count: how many rows, 0-d.
        total: the sum of the rows, shape ``(D,)``, float64.
        products: the sum of their outer products, shape ``(D, D)``, float64.

    Returns:
        As :func:`moments`.

    Example:
        >>> rows = torch.tensor([[0.0, 0.0], [2.0, 4.0]]).double()
        >>> moments_of_sums(torch.tensor(2), rows.sum(dim=0), rows.T @ rows)[1]
        tensor([[2., 4.],
                [4., 8.]], dtype=torch.float64)
    """
    mean = total / count
    return mean, (products - count * mean.outer(mean)) / (count - 1)


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    r"""Return the squared Fréchet distance of two normal distributions, which "the FID" is.

    .. math:: \lVert \mu - \mu' \rVert^2 + \operatorname{tr}\big(\Sigma + \Sigma' - 2 (\Sigma \Sigma')^{1/2}\big)

    (Heusel et al., NeurIPS 2017, arXiv:1706.08500.) The trace of the root is that of
    :math:`(\Sigma^{1/2} \Sigma' \Sigma^{1/2})^{1/2}`, which is symmetric, so that its eigenvalues are real and
    exact even where there are fewer images than features.

    Args:
        first: mean ``(D,)`` and covariance ``(D, D)``, as :func:`moments` returns them.
        second: likewise.

    Returns:
        0-d tensor, at least 0, float64.

    Example:
        >>> wide, narrow = torch.eye(2).double() * 4, torch.eye(2).double()
        >>> frechet_distance((torch.zeros(2), wide), (torch.ones(2), narrow))
        tensor(4., dtype=torch.float64)
    """
    (mean, covariance), (other_mean, other_covariance) = first, second
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * cross
    return distance.clamp(min=0)
