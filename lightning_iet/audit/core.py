"""The audit itself: from sets of images to what there is to say about them. It knows of no files."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.features import CLASS_LIKE, PIXELS, Features, build_features, check_comparable, extract
from lightning_iet.audit.reading import ImageSet
from lightning_iet.audit.search import (
    Invariance,
    Neighbors,
    References,
    View,
    cosine_distances,
    nearest_references,
    views,
)
from lightning_iet.functional.duplicates import Duplicates, find_duplicates, without_self
from lightning_iet.functional.memorization import distinct_ratio, memorization_ratio, nearest_ratio


@dataclass(frozen=True, eq=False)
class Copies:
    """A set of ``Q`` images beside their nearest training images.

    Attributes:
        neighbors: the training images nearest to each.
        ratios: by name of the measure, shape ``(Q,)`` each, in [0, 1]; the lower, the more like a copy. ``"nearest"``
            is ``d1 / d2``, ``"mean"`` the ratio of the memorized quantity, ``"distinct"`` that of
            :func:`~lightning_iet.functional.duplicates.distinct_ratio`, where near-duplicates were looked for.
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
        ratios = {"distinct": distinct_ratio(neighbors.sq_distances, neighbors.indices, duplicates.group)} | ratios
    return Copies(neighbors, ratios, _identical(images.pixels, train.pixels, neighbors, views), cosine)


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


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What counts as a copy.

    Attributes:
        k: neighbours in the mean of the memorized quantity.
        ratio: ``d1 / d2`` below which an image counts as a copy.
        invariance: versions of an image that are compared as well.
        duplicates: whether near-duplicates inside the training set are looked for.
    """

    k: int = 50
    ratio: float = 1 / 3
    invariance: Invariance = "none"
    duplicates: bool = True

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.k < 2:
            raise ValueError(f"Argument `k` expected an integer ≥ 2, but got {self.k}. The published one is 50.")
        if not 0 < self.ratio <= 1:
            raise ValueError(
                f"Argument `ratio` expected a number in (0, 1], but got {self.ratio}. The published one is 1/3."
            )


@dataclass(frozen=True, eq=False)
class Audit:
    """All that an audit has found, with the images that it is about.

    Attributes:
        settings: what counts as a copy.
        features: what distances were measured in.
        sets: ``"generated"``, ``"train"`` and perhaps ``"held_out"`` images.
        copies: of the ``"generated"`` and perhaps the ``"held_out"`` images.
        duplicates: near-duplicates inside the training set, if they were looked for.
    """

    settings: Settings
    features: Features
    sets: Mapping[str, ImageSet]
    copies: Mapping[str, Copies]
    duplicates: Duplicates | None = field(default=None)


def audit_images(
    generated: ImageSet,
    train: ImageSet,
    held_out: ImageSet | None = None,
    *,
    features: Features,
    cache: BlockCache,
    settings: Settings | None = None,
) -> Audit:
    """Find out which generated images are copies of training images.

    Args:
        generated: the images to judge.
        train: the images that may have been copied.
        held_out: real images that the generator has not seen, judged in the same way as a control.
        features: what distances are measured in.
        cache: where intermediate results go, and come from after an interruption.
        settings: what counts as a copy.

    Returns:
        What was found, on every process.

    Raises:
        ValueError: if sets differ in size, are the same, or are too small, or features are not finite.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from pathlib import Path
        >>> from lightning_iet.audit.features import build_features
        >>> from lightning_iet.audit.reading import image_set
        >>> generator = torch.Generator().manual_seed(0)
        >>> pixels = torch.randint(256, (200, 1, 8, 8), generator=generator, dtype=torch.uint8)
        >>> train = image_set(pixels[:100], location="train")
        >>> generated = image_set(pixels[95:], location="generated")  # 5 of 105 are copies
        >>> with TemporaryDirectory() as folder:
        ...     audit = audit_images(
        ...         generated, train, features=build_features("pixels"), cache=BlockCache(Path(folder))
        ...     )
        >>> int((audit.copies["generated"].ratios["nearest"] < 1 / 3).sum())
        5
    """
    settings = settings or Settings()
    sets = {"generated": generated, "train": train} | ({} if held_out is None else {"held_out": held_out})
    check_sets(sets, settings.k)
    sets = _same_channels(sets)
    train = sets["train"]
    rows = {name: extract(images, features, cache, argument=name) for name, images in sets.items()}
    if features.name != PIXELS:
        check_comparable(rows["train"], name=features.name)
    references = References.of(rows["train"], train.sha256)
    versions = views(settings.invariance)
    tools: dict[str, Any] = {"features": features, "cache": cache}

    duplicates = None
    if settings.duplicates and len(train) > 2:
        # To a classifier all images of a class are nearly the same: then pixels tell what stands there twice.
        judge = build_features(PIXELS) if features.name in CLASS_LIKE else features
        itself = _within(train, references if judge is features else None, judge, settings.k, cache)
        duplicates = find_duplicates(
            *without_self(itself.sq_distances, itself.indices), ratio=settings.ratio, features=judge.name
        )

    copies = {}
    for name in (name for name in sets if name != "train"):
        options: dict[str, Any] = {"k": settings.k, "views": versions, "argument": name, "rows": rows[name]}
        found, cosine = nearest_references(sets[name], references, **options, **tools), None
        if features.name != PIXELS:  # the direction of pixels says little
            cosine = cosine_distances(sets[name], rows[name], references, argument=name, **tools)
        copies[name] = find_copies(sets[name], train, found, views=versions, duplicates=duplicates, cosine=cosine)
    return Audit(settings, features, sets, copies, duplicates)


def check_sets(sets: Mapping[str, ImageSet], k: int) -> None:
    """Refuse sets that cannot be compared.

    Args:
        sets: images by name, among them ``"train"``.
        k: neighbours that are to be found among the training images.

    Raises:
        ValueError: if sets differ in size, are the same, or there are fewer training images than ``k``.
    """
    train = sets["train"]
    for name, images in sets.items():
        if images.pixels.shape[2:] != train.pixels.shape[2:]:
            raise ValueError(
                f"Argument `{name}` expected images of {_size(train)} pixels, as the training images have, but got "
                f"{_size(images)}. Say with --resize what size to bring them all to."
            )
    seen: dict[str, str] = {}
    for name, images in sets.items():
        if images.sha256 in seen:
            raise ValueError(
                f"Argument `{name}` expected other images than `{seen[images.sha256]}`, but got the same ones, "
                f"'{images.location}'. Check both paths."
            )
        seen[images.sha256] = name
    if len(train) < k:
        raise ValueError(
            f"Argument `train` expected at least k = {k} images, but got {len(train)}. Add images, or lower --k."
        )


def _within(train: ImageSet, references: References | None, features: Features, k: int, cache: BlockCache) -> Neighbors:
    """Find the training images nearest to each training image, itself among them."""
    if references is None:
        references = References.of(extract(train, features, cache, argument="train"), train.sha256)
    options: dict[str, Any] = {"k": min(k + 1, len(train)), "views": views("none"), "argument": "train"}
    return nearest_references(train, references, features=features, cache=cache, rows=references.rows, **options)


def _same_channels(sets: Mapping[str, ImageSet]) -> dict[str, ImageSet]:
    """Repeat grey images over the channels where another set is in colour."""
    channels = max(images.pixels.shape[1] for images in sets.values())
    return {
        name: replace(images, pixels=images.pixels.expand(-1, channels, -1, -1).contiguous())
        for name, images in sets.items()
    }


def _size(images: ImageSet) -> str:
    height, width = images.pixels.shape[2:]
    return f"{width}x{height}"
