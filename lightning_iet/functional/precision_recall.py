"""Improved precision and recall of generated images."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_iet.functional.checks import check_features

_FLOATS = 2**24  # distances (128 MiB) that are held at a time
_UNIT = 2.0**-53  # the relative error of one float64 rounding


def squared_radii(features: Tensor, k: int) -> Tensor:
    """Return the squared distance of every row, ``(N, D)``, to its ``k``-th nearest other row, ``(N,)``, float64.

    Raises:
        ValueError: if not ``1 <= k < N``.
    """
    if not 1 <= k < len(features):
        raise ValueError(
            f"Argument `k` expected a number from 1 to the number of images less one, {len(features) - 1}, "
            f"but got {k}. Pass a smaller `k` or more images."
        )
    rows = features.double() - _origin(features)
    radii = []
    for start, distances, _ in _blocks(rows, rows):
        distances.diagonal(start).fill_(torch.inf)  # an image is not its own neighbour
        radii.append(distances.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)


def neighborhood_counts(points: Tensor, centers: Tensor, sq_radii: Tensor, *, closed: bool) -> tuple[Tensor, Tensor]:
    """Count, for every point, the centers within whose radius it lies, and for every center the points within.

    Args:
        points: shape ``(P, D)``.
        centers: shape ``(N, D)``.
        sq_radii: as :func:`squared_radii`, shape ``(N,)``.
        closed: whether a point at exactly that distance counts.

    Returns:
        int64, shapes ``(P,)`` and ``(N,)``.
    """
    origin = _origin(centers)
    # Sums of D products err by D u, in norms and products alike, and in the radii again; with a few roundings to spare.
    rounding = 4 * (centers.shape[1] + 8) * _UNIT
    of_points, of_centers = [], torch.zeros(len(centers), dtype=torch.int64, device=centers.device)
    for _, distances, scale in _blocks(points.double() - origin, centers.double() - origin):
        tolerance = rounding * scale
        inside = distances <= sq_radii + tolerance if closed else distances < sq_radii - tolerance
        of_points.append(inside.sum(dim=1))
        of_centers += inside.sum(dim=0)
    return torch.cat(of_points), of_centers


def _origin(rows: Tensor) -> Tensor:
    return rows.double().median(dim=0).values


def _blocks(rows: Tensor, others: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield, for some rows at a time, the first one's index, all squared distances, and the size of their terms."""
    norms, other_norms = rows.square().sum(dim=1), others.square().sum(dim=1)
    step = max(1, _FLOATS // max(1, len(others)))
    for start in range(0, max(1, len(rows)), step):
        scale = norms[start : start + step, None] + other_norms
        yield start, torch.addmm(scale, rows[start : start + step], others.T, alpha=-2).clamp_(min=0), scale


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
        k: the neighbour whose distance is the radius; 3 as published.

    Returns:
        ``"precision"`` and ``"recall"``, 0-d tensors in [0, 1], float64.

    Raises:
        TypeError, ValueError: as :func:`~lightning_iet.functional.checks.check_features`.
        ValueError: if a set has no more than ``k`` images.

    Example:
        >>> import torch
        >>> real = torch.arange(8.0)[:, None]
        >>> precision_recall(torch.tensor([[0.0], [1.0], [2.0], [50.0]]), real, k=1)
        {'precision': tensor(0.7500, dtype=torch.float64), 'recall': tensor(1., dtype=torch.float64)}
    """
    check_features(generated=generated, real=real)
    in_real, _ = neighborhood_counts(generated, real, squared_radii(real, k), closed=True)
    in_generated, _ = neighborhood_counts(real, generated, squared_radii(generated, k), closed=True)
    return {"precision": (in_real > 0).double().mean(), "recall": (in_generated > 0).double().mean()}
