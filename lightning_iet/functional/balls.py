"""Balls around features, as wide as their k-th nearest neighbour is far: an estimate of where a distribution lives.

All in float64. Distances that differ by less than float64 can tell count as equal, so that the answer for an image that
lies exactly on a ball, such as a copy, does not hang on rounding. What float64 can tell depends on how far two images
lie from the origin, which is put at their median: an outlier far away, unlike in a mean, moves it by nothing.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["ball_counts", "squared_radii"]

_FLOATS = 2**24  # distances (128 MiB) that are held at a time
_UNIT = 2.0**-53  # the relative error of one float64 rounding


def squared_radii(features: Tensor, k: int) -> Tensor:
    """Return the squared distance of every row to its ``k``-th nearest other row.

    Args:
        features: shape ``(N, D)``.
        k: which neighbour, ``1 <= k < N``.

    Returns:
        Shape ``(N,)``, float64.

    Raises:
        ValueError: if ``k`` is out of range.

    Example:
        >>> squared_radii(torch.tensor([[0.0], [1.0], [5.0]]), 1)
        tensor([ 1.,  1., 16.], dtype=torch.float64)
    """
    if not 1 <= k < len(features):
        raise ValueError(
            f"Argument `k` expected a number from 1 to the number of images less one, {len(features) - 1}, "
            f"but got {k}. Pass a smaller `k` or more images."
        )
    rows = features.double() - _origin(features)
    radii = []
    for start, distances, _ in _blocks(rows, rows):
        distances.diagonal(start).fill_(torch.inf)  # nobody is his own neighbour
        radii.append(distances.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)


def ball_counts(points: Tensor, centers: Tensor, sq_radii: Tensor, *, closed: bool) -> tuple[Tensor, Tensor]:
    """Count, for every point, the balls that it lies in, and for every ball the points that lie in it.

    Args:
        points: shape ``(P, D)``.
        centers: shape ``(N, D)``.
        sq_radii: as :func:`squared_radii`, shape ``(N,)``.
        closed: whether a point on the surface lies in the ball.

    Returns:
        int64, shapes ``(P,)`` and ``(N,)``.

    Example:
        >>> centers, radii = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([1.0, 1.0, 4.0])
        >>> ball_counts(torch.tensor([[1.0], [9.0]]), centers, radii, closed=True)
        (tensor([3, 0]), tensor([1, 1, 1]))
        >>> ball_counts(torch.tensor([[1.0], [9.0]]), centers, radii, closed=False)
        (tensor([1, 0]), tensor([0, 1, 0]))
    """
    origin = _origin(centers)
    # Sums of D products err by D u, in norms and products alike, and in the radii again; with a few roundings to spare.
    rounding = 4 * (centers.shape[1] + 8) * _UNIT
    of_points, of_balls = [], torch.zeros(len(centers), dtype=torch.int64, device=centers.device)
    for _, distances, scale in _blocks(points.double() - origin, centers.double() - origin):
        tolerance = rounding * scale
        inside = distances <= sq_radii + tolerance if closed else distances < sq_radii - tolerance
        of_points.append(inside.sum(dim=1))
        of_balls += inside.sum(dim=0)
    return torch.cat(of_points), of_balls


def _origin(rows: Tensor) -> Tensor:
    return rows.double().median(dim=0).values


def _blocks(rows: Tensor, others: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield, for some rows at a time, the first one's index, all squared distances, and the size of their terms."""
    norms, other_norms = rows.square().sum(dim=1), others.square().sum(dim=1)
    step = max(1, _FLOATS // max(1, len(others)))
    for start in range(0, max(1, len(rows)), step):
        scale = norms[start : start + step, None] + other_norms
        yield start, torch.addmm(scale, rows[start : start + step], others.T, alpha=-2).clamp_(min=0), scale
