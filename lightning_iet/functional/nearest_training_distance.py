"""How far generated images lie from their nearest training images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_iet.functional.checks import check_numbers
from lightning_iet.functional.neighbors import nearest_neighbors

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75)
"""The quantiles that are reported."""


def nearest_training_distance(
    generated: Tensor, train: Tensor, *, quantiles: Sequence[float] = QUANTILES
) -> dict[str, Tensor]:
    r"""Summarise the plain l2 distance of every generated image to its nearest training image.

    .. math:: d_1(\hat x) = \min_j \lVert \hat x - x_j \rVert

    Args:
        generated: shape ``(Q, C, H, W)``, uint8 or floating point in [0, 1].
        train: shape ``(N, C, H, W)``, likewise.
        quantiles: numbers in [0, 1].

    Returns:
        As :func:`distance_summary`.

    Raises:
        TypeError, ValueError: as :func:`~lightning_iet.functional.neighbors.nearest_neighbors`.
        ValueError: as :func:`check_quantiles`.

    Example:
        >>> train = torch.eye(4).reshape(4, 1, 2, 2)
        >>> nearest_training_distance(0.5 * train[:3], train, quantiles=(0.5,))
        {'mean': tensor(0.5000), 'q0.5': tensor(0.5000)}
    """
    check_quantiles(quantiles)
    sq_distances, _ = nearest_neighbors(generated, train, 1)
    return distance_summary(sq_distances[:, 0].sqrt(), quantiles=quantiles)


def distance_summary(distances: Tensor, *, quantiles: Sequence[float] = QUANTILES) -> dict[str, Tensor]:
    """Return mean and quantiles, to the last bit the same for every order of the distances.

    Args:
        distances: shape ``(Q,)``.
        quantiles: numbers in [0, 1]; between two distances it is interpolated linearly.

    Returns:
        ``"mean"`` and, for each quantile, ``"q0.05"`` and the like; 0-d tensors, NaN if there are no distances.

    Raises:
        ValueError: as :func:`check_quantiles`.

    Example:
        >>> distance_summary(torch.tensor([1.0, 2.0, 6.0]), quantiles=(0.0, 0.5))
        {'mean': tensor(3.), 'q0': tensor(1.), 'q0.5': tensor(2.)}
    """
    check_quantiles(quantiles)
    ordered = distances.double().sort().values
    points = ordered.new_tensor(quantiles) * (len(ordered) - 1)
    values = _interpolated(ordered, points) if len(ordered) else torch.full_like(points, torch.nan)
    names = [f"q{quantile:g}" for quantile in quantiles]
    summary = {"mean": ordered.mean()} | dict(zip(names, values, strict=True))
    return {name: value.to(distances.dtype) for name, value in summary.items()}


def check_quantiles(quantiles: Sequence[float]) -> None:
    """Raise a ValueError for quantiles outside [0, 1], and for two that would have one name."""
    check_numbers("quantiles", quantiles, "[0, 1]", f"Leave it out for {QUANTILES}.")


def _interpolated(ordered: Tensor, points: Tensor) -> Tensor:
    """Read ``ordered`` at fractional indices; torch.quantile refuses more than 16 million values."""
    return torch.lerp(ordered[points.floor().long()], ordered[points.ceil().long()], points.frac())
