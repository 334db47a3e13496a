"""Which images of a set are copies of training images."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_iet.audit.duplicates import Duplicates
from lightning_iet.audit.images import ImageSet
from lightning_iet.audit.search import Neighbors
from lightning_iet.audit.views import View
from lightning_iet.functional.memorization import memorization_ratio, nearest_ratio

__all__ = ["Copies", "distinct_ratio", "find_copies", "most_copied"]


@dataclass(frozen=True, eq=False)
class Copies:
    """A set of ``Q`` images beside their nearest training images.

    Attributes:
        neighbors: the training images nearest to each.
        ratios: by name of the measure, shape ``(Q,)`` each, in [0, 1]; the lower, the more like a copy. ``"nearest"``
            is ``d1 / d2``, ``"mean"`` the ratio of the memorized quantity, ``"distinct"`` that of
            :func:`distinct_ratio`, where near-duplicates were looked for.
        identical: whether an image equals its nearest training image in every pixel, bool, shape ``(Q,)``.
        cosine: cosine distance to the training image nearest in direction, shape ``(Q,)``, of a network's features.
    """

    neighbors: Neighbors
    ratios: Mapping[str, Tensor]
    identical: Tensor
    cosine: Tensor | None = None


def find_copies(
    images: ImageSet,
    train: ImageSet,
    neighbors: Neighbors,
    *,
    views: Mapping[str, View],
    duplicates: Duplicates | None = None,
    cosine: Tensor | None = None,
) -> Copies:
    """Measure how much closer each image is to one training image than to others.

    Args:
        images: ``Q`` images.
        train: the training images.
        neighbors: the training images nearest to each.
        views: versions of an image that were searched for.
        duplicates: groups of training images, where they are known.
        cosine: cosine distances, where they were measured.

    Returns:
        The ratios of each image.
    """
    ratios = {
        "nearest": nearest_ratio(neighbors.sq_distances),
        "mean": memorization_ratio(neighbors.sq_distances),
    }
    if duplicates is not None:
        ratios = {"distinct": distinct_ratio(neighbors, duplicates.group)} | ratios
    return Copies(neighbors, ratios, _identical(images.pixels, train.pixels, neighbors, views), cosine)


def distinct_ratio(neighbors: Neighbors, group: Tensor) -> Tensor:
    """Compare the nearest training image with the nearest one that shows something else.

    ``d1 / d2`` as published, with near-duplicates in the training set counted as one image *(our choice: a copy of an
    image that stands twice in the training set is as near to both, so that d1 / d2 is 1, although copies are made of
    just these)*. Without near-duplicates it is the published ratio.

    Args:
        neighbors: the nearest training images of ``Q`` images.
        group: number of the group of each training image, shape ``(N,)``.

    Returns:
        Shape ``(Q,)``. Where all neighbours show the same thing, the last of them stands for the others.

    Example:
        >>> indices = torch.tensor([[0, 1, 2]])
        >>> neighbors = Neighbors(torch.tensor([[1.0, 1.0, 16.0]]), indices, torch.zeros_like(indices))
        >>> distinct_ratio(neighbors, torch.tensor([7, 7, 8])), nearest_ratio(neighbors.sq_distances)
        (tensor([0.2500]), tensor([1.]))
    """
    groups = group[neighbors.indices]
    other = groups != groups[:, :1]
    other[:, -1] = True
    second = other.int().argmax(dim=1, keepdim=True)  # the first that is true
    pair = torch.cat([neighbors.sq_distances[:, :1], neighbors.sq_distances.gather(1, second)], dim=1)
    return nearest_ratio(pair)


def most_copied(nearest: Tensor, copied: Tensor) -> list[tuple[int, list[int]]]:
    """List training images by how many copies there are of each.

    Args:
        nearest: position of the nearest training image, shape ``(Q,)``.
        copied: which images are copies, bool, shape ``(Q,)``.

    Returns:
        Positions of training images, most copied first, each with the positions of its copies.

    Example:
        >>> most_copied(torch.tensor([5, 3, 5, 4]), torch.tensor([True, True, True, False]))
        [(5, [0, 2]), (3, [1])]
    """
    copies: dict[int, list[int]] = {}
    for index in copied.nonzero().flatten().tolist():
        copies.setdefault(int(nearest[index]), []).append(index)
    return sorted(copies.items(), key=lambda item: (-len(item[1]), item[0]))


def _identical(images: Tensor, train: Tensor, neighbors: Neighbors, views: Mapping[str, View]) -> Tensor:
    identical = torch.zeros(len(images), dtype=torch.bool)
    nearest, version = neighbors.indices[:, 0], neighbors.views[:, 0]
    for number, view in enumerate(views.values()):
        for places in (version == number).nonzero().flatten().split(1024):
            same = view(images[places]) == train[nearest[places]]
            identical[places] = same.flatten(1).all(dim=1)
    return identical
