"""Points that no other point beats in every objective, the volume they dominate, and the choice of one of them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_ROWS = 1024  # points that are compared with all others at once


class Choice(NamedTuple):
    """A point, and the rule that chose it.

    Attributes:
        point: its index.
        rule: ``"control"``, the best first objective among the points that keep all limits, or ``"knee"``.
    """

    point: int
    rule: Literal["control", "knee"]


def pareto_front(values: Tensor) -> Tensor:
    r"""Return which points no other point dominates; every objective is minimised.

    A point :math:`u` dominates :math:`v` if :math:`u_j \le v_j` for all :math:`j` and :math:`u_j < v_j` for one. Equal
    points do not dominate each other, so ties stay.

    Args:
        values: objectives of the points, shape ``(N, p)``.

    Returns:
        Whether each point lies on the front, bool, shape ``(N,)``.

    Raises:
        ValueError: if the shape is another one, or a value is NaN.

    Example:
        >>> pareto_front(torch.tensor([[1.0, 4.0], [2.0, 2.0], [2.0, 2.0], [3.0, 3.0], [4.0, 1.0]]))
        tensor([ True,  True,  True, False,  True])
    """
    _check(values)
    dominated = [
        ((values <= rows[:, None]).all(2) & (values < rows[:, None]).any(2)).any(1) for rows in values.split(_ROWS)
    ]
    return ~torch.cat(dominated)


def hypervolume(values: Tensor, reference: Tensor | Sequence[float]) -> float:
    r"""Return the volume that the points dominate, up to a reference point; every objective is minimised.

    The Lebesgue measure of :math:`\bigcup_i [v_i, r]`, Zitzler and Thiele 1998, by slices along the last objective.
    Points that do not lie below the reference in every objective add nothing. Exact; the cost grows as
    :math:`N^{p-1}`, made for fronts of at most some hundred points.

    Args:
        values: objectives of the points, shape ``(N, p)``.
        reference: the worst point that counts, shape ``(p,)``.

    Returns:
        The volume, 0 if no point lies below the reference.

    Raises:
        ValueError: if the shapes do not fit, or a value is NaN.

    Example:
        >>> hypervolume(torch.tensor([[1.0, 3.0], [2.0, 1.0]]), [4.0, 4.0])
        7.0
    """
    _check(values)
    corner = torch.as_tensor(reference, dtype=torch.float64)
    if corner.shape != values.shape[1:]:
        raise ValueError(
            f"Argument `reference` expected {values.shape[1]} numbers, one for each objective, but got shape "
            f"{tuple(corner.shape)}."
        )
    inside = values.double()[(values.double() < corner).all(1)]
    if not len(inside):
        return 0.0
    return _volume(inside[pareto_front(inside)].unique(dim=0).tolist(), corner.tolist())


def knee_distance(values: Tensor) -> Tensor:
    r"""Return how far the points of a front lie below the plane through its ends.

    With the objectives scaled to [0, 1] over the front, :math:`d_i = (1 - \sum_j z_{ij}) / \sqrt p`. For two objectives
    this is the distance to the chord between the ends, positive towards the better side. The largest is the knee.

    Args:
        values: objectives of the front's points, shape ``(N, p)``, minimised.

    Returns:
        The signed distance of each point, float64, shape ``(N,)``. An objective that is the same for all counts as 0.

    Raises:
        ValueError: if the shape is another one, or a value is NaN.

    Example:
        >>> knee_distance(torch.tensor([[0.0, 4.0], [1.0, 1.0], [4.0, 0.0]]))
        tensor([0.0000, 0.3536, 0.0000], dtype=torch.float64)
    """
    _check(values)
    points = values.double()
    low, span = points.amin(0), points.amax(0) - points.amin(0)
    scaled = torch.where(span > 0, (points - low) / span, 0.0)
    return (1 - scaled.sum(1)) / points.shape[1] ** 0.5


def choose_point(
    values: Tensor,
    *,
    limits: Tensor | Sequence[float] | None = None,
    trained: Tensor | Sequence[int] | None = None,
) -> Choice:
    """Choose one point: the best quality that memorizes no more than the limits allow, else the knee of the front.

    *(our choice; MemControl gives no rule)* 1. Among the points of the front whose objectives after the first keep
    their limits, the smallest first objective. 2. If there is none, or no limits are given, the largest
    :func:`knee_distance`. Ties go to fewer trained parameters, then to the earlier point.

    Args:
        values: objectives of the points, quality first, shape ``(N, p)``, minimised.
        limits: what each further objective may be at most, shape ``(p - 1,)``.
        trained: number of trained parameters of each point, shape ``(N,)``.

    Raises:
        ValueError: if there is no point, a value is NaN, or the shapes do not fit.

    Example:
        >>> points = torch.tensor([[9.0, 0.0], [5.0, 0.01], [4.0, 0.3], [1.0, 0.9]])
        >>> choose_point(points, limits=[0.02])
        Choice(point=1, rule='control')
        >>> choose_point(points + torch.tensor([0.0, 0.1]), limits=[0.02])
        Choice(point=1, rule='knee')
    """
    front = pareto_front(values).nonzero()[:, 0]
    if not len(front):
        raise ValueError("Argument `values` expected at least one point, but got none.")
    counts = torch.zeros(len(values)) if trained is None else torch.as_tensor(trained)
    if counts.shape != values.shape[:1]:
        raise ValueError(f"Argument `trained` expected {len(values)} numbers, but got shape {tuple(counts.shape)}.")
    if limits is not None:
        bounds = torch.as_tensor(limits, dtype=torch.float64)
        if bounds.shape != (values.shape[1] - 1,):
            raise ValueError(
                f"Argument `limits` expected {values.shape[1] - 1} numbers, but got shape {tuple(bounds.shape)}."
            )
        kept = front[(values[front, 1:].double() <= bounds).all(1)]
        if len(kept):
            return Choice(_least(kept, values[kept, 0].double(), counts), "control")
    return Choice(_least(front, -knee_distance(values[front]), counts), "knee")


def _least(indices: Tensor, costs: Tensor, trained: Tensor) -> int:
    """Index of the least cost; equal costs go by trained parameters, then by index."""
    best = indices[costs == costs.min()]
    return int(best[trained[best].argsort(stable=True)[0]])


def _volume(points: list[list[float]], corner: list[float]) -> float:
    """Volume between points and a corner, by slices along the last axis."""
    if len(corner) == 1:
        return corner[0] - min(point[0] for point in points)
    ordered = sorted(points, key=lambda point: point[-1])
    ends = [*(point[-1] for point in ordered[1:]), corner[-1]]
    return sum(
        (end - point[-1]) * _volume([row[:-1] for row in ordered[: number + 1]], corner[:-1])
        for number, (point, end) in enumerate(zip(ordered, ends, strict=True))
        if end > point[-1]
    )


def _check(values: Tensor) -> None:
    """Refuse what is no table of objectives."""
    if values.ndim != 2 or values.shape[1] < 1:
        raise ValueError(f"Argument `values` expected shape (N, p), but got {tuple(values.shape)}.")
    if values.isnan().any():
        row = int(values.isnan().any(1).nonzero()[0])
        raise ValueError(f"Argument `values` expected numbers, but got NaN for point {row}. Leave failed trials out.")
