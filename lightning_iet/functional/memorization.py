"""How many generated images are copies of training images.

All distances run from **generated** images to their nearest **training** images. The reverse direction would not do: a
generator that emits one training image over and over is far from most of the training set, and seems harmless.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_iet.functional.duplicates import duplicate_groups, nearest_of_two_groups
from lightning_iet.functional.neighbors import nearest_neighbors

MQ_THRESHOLDS = (0.15, 0.20, 0.30, 0.40, 0.50, 0.60, 0.70, 0.80, 0.90)
"""The published thresholds of the memorized quantity."""


def memorization_ratio(sq_distances: Tensor) -> Tensor:
    r"""Compare the nearest training image with the neighbourhood that it stands in.

    .. math:: r = \min_j D_j \Big/ \frac{1}{k} \sum_{j=1}^{k} D_j, \qquad D_j = \lVert \hat x - x_j \rVert^2

    The sum is over the ``k`` nearest (50 in Liu et al., ECCV 2024, arXiv:2407.15328), the nearest included. A copy has
    a ratio near 0, an image that is no closer to one training image than to others a ratio near 1.

    0 / 0, where an image equals ``k`` training images at once, counts as 0 *(our choice: it is a copy of each)*.

    Args:
        sq_distances: squared distances to the ``k`` nearest training images, shape ``(Q, k)``, in any order.

    Returns:
        Shape ``(Q,)``, in [0, 1].

    Example:
        >>> memorization_ratio(torch.tensor([[1.0, 3.0, 8.0], [4.0, 4.0, 4.0], [0.0, 0.0, 0.0]]))
        tensor([0.2500, 1.0000, 0.0000])
    """
    return _ratio(sq_distances.amin(dim=1), sq_distances.mean(dim=1))


def nearest_ratio(sq_distances: Tensor) -> Tensor:
    r"""Compare the nearest training image with the second nearest, in plain l2 distance.

    .. math:: \rho = d_1 / d_2, \qquad d_j = \lVert \hat x - x_{(j)} \rVert

    (Yoon et al. 2023; Gu et al., arXiv:2310.02664.) 0 / 0, where an image equals a training image that stands twice in
    the set, counts as 0 *(our choice: it is a copy, however often the original stands there)*.

    Args:
        sq_distances: squared distances to the nearest training images, ascending, shape ``(Q, k)`` with ``k >= 2``.

    Returns:
        Shape ``(Q,)``, in [0, 1].

    Example:
        >>> nearest_ratio(torch.tensor([[1.0, 16.0], [9.0, 9.0], [0.0, 0.0]]))
        tensor([0.2500, 1.0000, 0.0000])
    """
    return _ratio(sq_distances[:, 0].sqrt(), sq_distances[:, 1].sqrt())


def distinct_ratio(sq_distances: Tensor, indices: Tensor, group: Tensor) -> Tensor:
    """Compare the nearest training image with the nearest one that shows something else.

    ``d1 / d2`` as published, with near-duplicates in the training set counted as one image *(our choice: a copy of an
    image that stands twice in the training set is as near to both, so that d1 / d2 is 1, although copies are made of
    just these)*. Without near-duplicates it is the published ratio.

    Args:
        sq_distances: to the ``k`` nearest training images of ``Q`` images, shape ``(Q, k)``, ascending.
        indices: their positions, shape ``(Q, k)``.
        group: number of the group of each training image, shape ``(N,)``.

    Returns:
        Shape ``(Q,)``. Where all neighbours show the same thing, the last of them stands for the others: look at more
        neighbours than the largest group has images.

    Example:
        >>> sq_distances, indices = torch.tensor([[1.0, 1.0, 16.0]]), torch.tensor([[0, 1, 2]])
        >>> distinct_ratio(sq_distances, indices, torch.tensor([7, 7, 8])), nearest_ratio(sq_distances)
        (tensor([0.2500]), tensor([1.]))
    """
    groups = group[indices]
    other = groups != groups[:, :1]
    other[:, -1] = True
    second = other.int().argmax(dim=1, keepdim=True)  # the first that is true
    return nearest_ratio(torch.cat([sq_distances[:, :1], sq_distances.gather(1, second)], dim=1))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, 0.0)


def count_below(ratios: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Count the ratios below each threshold, strictly.

    Args:
        ratios: shape ``(Q,)``.
        thresholds: ``T`` numbers.

    Returns:
        Shape ``(T,)``, int64.

    Example:
        >>> count_below(torch.tensor([0.1, 0.5, 0.9]), (0.5, 0.6))
        tensor([1, 2])
    """
    return (ratios < ratios.new_tensor(thresholds)[:, None]).sum(dim=1)


def mq_name(threshold: float) -> str:
    """Return the key of the memorized quantity at a threshold, such as ``"mq_0.15"``."""
    return f"mq_{threshold:g}"


def memorized_quantity(
    generated: Tensor, train: Tensor, *, thresholds: Sequence[float] = MQ_THRESHOLDS, k: int = 50
) -> dict[str, Tensor]:
    """Return the share of generated images whose :func:`memorization_ratio` lies below each threshold.

    The published count is the share times the number of generated images *(our choice: shares of sets of several sizes
    compare)*.

    Args:
        generated: shape ``(Q, C, H, W)``, uint8 or floating point in [0, 1].
        train: shape ``(N, C, H, W)``, likewise.
        thresholds: the ratios below which an image counts as memorised.
        k: neighbours that the mean runs over, at most ``N``.

    Returns:
        For each threshold, under ``"mq_0.15"`` and the like, a 0-d float64 tensor in [0, 1]; NaN if there are no
        generated images.

    Raises:
        TypeError, ValueError: as :func:`~lightning_iet.functional.neighbors.nearest_neighbors`.

    Example:
        >>> train = torch.eye(4).reshape(4, 1, 2, 2)
        >>> memorized_quantity(0.9 * train[:2], train, thresholds=(0.005, 0.01), k=3)
        {'mq_0.005': tensor(0., dtype=torch.float64), 'mq_0.01': tensor(1., dtype=torch.float64)}
    """
    sq_distances, _ = nearest_neighbors(generated, train, k)
    shares = count_below(memorization_ratio(sq_distances), thresholds).double() / len(generated)
    return dict(zip(map(mq_name, thresholds), shares, strict=True))


def memorized_fraction(
    generated: Tensor, train: Tensor, *, ratio: float = 1 / 3, duplicates: Literal["keep", "group"] = "keep"
) -> Tensor:
    """Return the share of generated images whose :func:`nearest_ratio` lies below ``ratio``.

    Args:
        generated: shape ``(Q, C, H, W)``, uint8 or floating point in [0, 1].
        train: shape ``(N, C, H, W)`` with ``N >= 2``, likewise.
        ratio: how much nearer than the second the nearest training image has to be.
        duplicates: ``"group"`` counts near-duplicates among the training images as one *(our choice)*: the second is
            then the nearest of another of their :func:`~lightning_iet.functional.duplicates.duplicate_groups`.

    Returns:
        0-d tensor in [0, 1], NaN if there are no generated images.

    Raises:
        TypeError, ValueError: as :func:`~lightning_iet.functional.neighbors.nearest_neighbors`.
        ValueError: if all training images are to be grouped and are of one group.

    Example:
        >>> train = torch.eye(4).reshape(4, 1, 2, 2)
        >>> memorized_fraction(torch.cat([0.9 * train[:1], torch.full((3, 1, 2, 2), 0.5)]), train)
        tensor(0.2500)
    """
    found = nearest_neighbors(generated, train, 2)
    if duplicates == "group":
        groups = duplicate_groups(train).group.to(train.device)
        found = nearest_of_two_groups(generated.flatten(1), train.flatten(1), groups, found=found)
    return (nearest_ratio(found[0]) < ratio).float().mean()
