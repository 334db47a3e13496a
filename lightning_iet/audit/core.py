"""The audit itself: from sets of images to what there is to say about them. It knows of no files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.comparability import contents, few_pixels, one_colour
from lightning_iet.audit.disguises import LEAST_SIDE, Matches, find_disguised, undo
from lightning_iet.audit.evidence import LARGEST, Evidence, telling_searches, weigh
from lightning_iet.audit.features import CLASS_LIKE, PIXELS, Features, build_features, check_comparable, extract
from lightning_iet.audit.planted import KINDS, Planted, plant
from lightning_iet.audit.reading import ImageSet
from lightning_iet.audit.search import (
    Invariance,
    Neighbors,
    References,
    View,
    cosine_distances,
    distinct_ratios,
    nearest_references,
    views,
)
from lightning_iet.functional.checks import check_number
from lightning_iet.functional.duplicates import Duplicates, find_duplicates, without_self
from lightning_iet.functional.exhaustive_neighbors import level_moments
from lightning_iet.functional.memorization import memorization_ratio, nearest_ratio

if TYPE_CHECKING:
    from lightning_iet.audit.pairs import Review

SEARCHES = ("plain", "recoloured", "degraded", "moved")
TOO_SMALL = f"images of fewer than {LEAST_SIDE} pixels are too small for it"
AFFORDABLE = 15 * 60  # seconds on one core that a search for moved copies may take by default
SECONDS = 0.008, 0.06  # for each training image and for each image that is searched for, on one core
GPU_TIMES = 20  # how much less they take on a GPU


@dataclass(frozen=True, eq=False)
class Copies:
    """A set of ``Q`` images beside the training images that they are the most like.

    Attributes:
        neighbors: the training images nearest to each by plain distances.
        ratios: by name of the measure, shape ``(Q,)`` each, in [0, 1]; the lower, the more like a copy. ``"nearest"``
            is ``d1 / d2``, ``"mean"`` the ratio of the memorized quantity, ``"distinct"`` that of
            :func:`~lightning_iet.functional.memorization.distinct_ratio`, where near-duplicates were looked for.
        identical: whether an image equals a training image in every pixel, bool, shape ``(Q,)``.
        cosine: cosine distance to the training image nearest in direction, shape ``(Q,)``, of a network's features.
        matches: what each search found, by its name, in the order of :data:`SEARCHES`.
        search_ratios: the ratio by each search that was made, shape ``(Q, S)``: what images are judged by.
        search_distances: the distance by each search, in units of its own, shape ``(Q, S)``.
        search_sources: position of the training image that each search found, int64, shape ``(Q, S)``.
        search_noise: peak signal-to-noise ratio to it once the disguise is undone, in dB, shape ``(Q, S)``; NaN where
            the ratio is above 0.5, or it was not measured, see :func:`measure_noise`.
        blank: whether an image shows one colour only, bool, shape ``(Q,)``.
        variance: mean over the channels of the variance of an image's pixels, in steps of 255, shape ``(Q,)``.
        content: a number by which equal images of the set are known, int64, shape ``(Q,)``, see
            :func:`~lightning_iet.audit.comparability.contents`.
        search: the position of the search that an image is shown by, int64, shape ``(Q,)``, see
            :func:`~lightning_iet.audit.evidence.weigh`.
    """

    neighbors: Neighbors
    ratios: Mapping[str, Tensor]
    identical: Tensor
    cosine: Tensor | None
    matches: Mapping[str, Matches]
    search_ratios: Tensor
    search_distances: Tensor
    search_sources: Tensor
    search_noise: Tensor
    blank: Tensor
    variance: Tensor
    content: Tensor
    search: Tensor

    @property
    def scores(self) -> Tensor:
        """The ratio by the search that each image is shown by, shape ``(Q,)``."""
        return self._shown(self.search_ratios)

    @property
    def sources(self) -> Tensor:
        """Position of the training image that it is the ratio to, int64, shape ``(Q,)``."""
        return self._shown(self.search_sources)

    @property
    def distances(self) -> Tensor:
        """The distance to that training image, in units of that search, shape ``(Q,)``."""
        return self._shown(self.search_distances)

    @property
    def noise(self) -> Tensor:
        """The peak signal-to-noise ratio to it once the disguise is undone, in dB, shape ``(Q,)``, or NaN."""
        return self._shown(self.search_noise)

    @property
    def maps(self) -> Tensor:
        """Maps from coordinates of the image to those of that training image, shape ``(Q, 2, 3)``."""
        maps = torch.stack([found.maps for found in self.matches.values()], dim=1)
        return maps[torch.arange(len(self.search)), self.search]

    def _shown(self, by_search: Tensor) -> Tensor:
        return by_search.gather(1, self.search[:, None])[:, 0]


def find_copies(
    images: ImageSet,
    train: ImageSet,
    neighbors: Neighbors,
    matches: Mapping[str, Matches],
    *,
    views: Mapping[str, View],
    distinct: Tensor | None = None,
    cosine: Tensor | None = None,
    plain: bool = True,
    moments: tuple[Tensor, Tensor] | None = None,
) -> Copies:
    """Measure how much closer each image is to one training image than to others.

    Every image is shown by the plain search, until the evidence says otherwise.

    Args:
        images: ``Q`` images.
        train: the training images.
        neighbors: the training images nearest to each.
        matches: what the searches for disguised copies found.
        views: versions of an image that were searched for.
        distinct: the ratios to the next image that shows something else, where near-duplicates were looked for.
        cosine: cosine distances, where they were measured.
        plain: whether plain distances tell single images apart, rather than classes.
        moments: ``level_moments`` of the images' channels, shape ``(Q, C)`` each, if at hand.
    """
    ratios = {
        "nearest": nearest_ratio(neighbors.sq_distances),
        "mean": memorization_ratio(neighbors.sq_distances),
    }
    if distinct is not None:
        ratios = {"distinct": distinct} | ratios
    identical = _identical(images.pixels, train.pixels, neighbors, views)
    for found in matches.values():
        identical |= _equal(images.pixels, train.pixels, found.indices)
    main = next(iter(ratios.values()))
    found = Matches(
        neighbors.sq_distances[:, 0].sqrt(),
        main if plain else torch.ones_like(main),
        neighbors.indices[:, 0],
        _maps(neighbors.views[:, 0], list(views)),
    )
    by_search = {"plain": found} | {name: matches[name] for name in SEARCHES[1:] if name in matches}
    distances, by_ratio, sources, _ = zip(*by_search.values(), strict=True)
    search_ratios = torch.stack(by_ratio, dim=1)
    return Copies(
        neighbors,
        ratios,
        identical,
        cosine,
        by_search,
        search_ratios=search_ratios,
        search_distances=torch.stack(distances, dim=1),
        search_sources=torch.stack(sources, dim=1),
        search_noise=torch.full_like(search_ratios, torch.nan),
        blank=one_colour(images.pixels),
        variance=_variance(images.pixels, moments),
        content=contents(images.pixels),
        search=torch.zeros(len(images), dtype=torch.int64),
    )


def measure_noise(copies: Copies, images: ImageSet, train: ImageSet) -> Copies:
    """Undo what each search has found, where its ratio is at most 0.5, and measure what difference is left."""
    ratios, indices, maps = (
        torch.stack([getattr(found, name) for found in copies.matches.values()], dim=1)
        for name in ("ratios", "indices", "maps")
    )
    noise = torch.full_like(copies.search_ratios, torch.nan)
    places, columns = (ratios <= LARGEST).nonzero(as_tuple=True)
    # Where searches have found the same, it is undone once.
    pairs = torch.stack([places, indices[places, columns]], dim=1).double()
    found = torch.cat([pairs, maps[places, columns].flatten(1).double()], dim=1)
    different, number = found.unique(dim=0, return_inverse=True)
    parts = []
    for part in different.split(256):
        place, index = part[:, :2].long().unbind(dim=1)
        parts.append(undo(images.pixels[place], train.pixels[index], part[:, 2:].float().view(-1, 2, 3))[1])
    if parts:
        noise[places, columns] = torch.cat(parts)[number]
    return replace(copies, search_noise=noise)


def _equal(images: Tensor, train: Tensor, indices: Tensor) -> Tensor:
    """Tell which images equal the training images of these positions: all of a few pixels first, then all pixels."""
    equal = (few_pixels(images) == few_pixels(train)[indices]).all(dim=1)
    for place in equal.nonzero().flatten().tolist():  # one by one: without a copy of large images
        equal[place] = torch.equal(images[place], train[indices[place]])
    return equal


def _variance(pixels: Tensor, moments: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return how much is lost of an image if each channel is replaced by its mean."""
    size = max(1, pixels[0, 0].numel())
    sums, squares = moments or level_moments(pixels.flatten(2))
    return ((size * squares - sums.square()) / size**2).mean(dim=1).float()


def _maps(versions: Tensor, names: list[str]) -> Tensor:
    """Maps of the versions of an image: those that begin with a mirrored one turn x around."""
    maps = torch.eye(2, 3).repeat(len(versions), 1, 1)
    mirrored = torch.tensor([name.startswith("mirrored") for name in names])[versions]
    maps[mirrored, 0, 0] = -1
    return maps


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
    nearest, version = neighbors.indices[:, 0], neighbors.views[:, 0]
    identical = _equal(images, train, nearest) & (version == 0)
    for number, view in list(enumerate(views.values()))[1:]:
        for places in (version == number).nonzero().flatten().split(1024):
            identical[places] = _equal(view(images[places]), train, nearest[places])
    return identical


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What counts as a copy.

    Attributes:
        k: neighbours in the mean of the memorized quantity.
        ratio: ``d1 / d2`` below which an image counts as a copy, as published.
        invariance: versions of an image that are compared by plain distances as well.
        duplicates: whether near-duplicates inside the training set are looked for.
        moved: whether moved copies are looked for; ``None`` = where it takes less than about 15 minutes.
        false_finds: the expected share of innocent images among those that are named as copies by comparison with
            held-out images.
    """

    k: int = 50
    ratio: float = 1 / 3
    invariance: Invariance = "none"
    duplicates: bool = True
    moved: bool | None = None
    false_finds: float = 0.05

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.k < 2:
            raise ValueError(f"Argument `k` expected an integer ≥ 2, but got {self.k}. The published one is 50.")
        check_number("ratio", self.ratio, "(0, 1]", "The published one is 1/3.")
        check_number("false_finds", self.false_finds, "(0, 1)", "The usual one is 0.05.")


@dataclass(frozen=True, eq=False)
class Audit:
    """All that an audit has found, with the images that it is about.

    Attributes:
        settings: what counts as a copy.
        features: what distances were measured in.
        sets: ``"generated"``, ``"train"`` and perhaps ``"held_out"`` images.
        copies: of the ``"generated"`` and perhaps the ``"held_out"`` images.
        duplicates: near-duplicates inside the training set, if they were looked for.
        evidence: what the scores say about the generated images.
        planted: copies that were planted, and searched for with the rest.
        planted_copies: what was found of them.
        not_moved: why moved copies were not looked for; empty if they were.
        not_degraded: likewise, of degraded copies.
        review: what a person has decided about pairs.
        unused_decisions: number of decisions that belong to no pair that any search has found.
        outweighed_decisions: number of dismissed pairs whose images stay named or noticed nevertheless, beside another
            training image, although nobody has confirmed that.
    """

    settings: Settings
    features: Features
    sets: Mapping[str, ImageSet]
    copies: Mapping[str, Copies]
    duplicates: Duplicates | None
    evidence: Evidence
    planted: Planted
    planted_copies: Copies
    not_moved: str = ""
    not_degraded: str = ""
    review: "Review | None" = None
    unused_decisions: int = 0
    outweighed_decisions: int = 0


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
    sets = same_channels(sets)
    train = sets["train"]
    rows = {name: extract(images, features, cache, argument=name) for name, images in sets.items()}
    if features.name != PIXELS:
        check_comparable(rows["train"], name=features.name)
    references = References.of(rows["train"], train.sha256)

    duplicates = None
    if settings.duplicates and len(train) > 2:
        # To a classifier all images of a class are nearly the same: then pixels tell what stands there twice.
        judge = build_features(PIXELS) if features.name in CLASS_LIKE else features
        itself = _within(train, references if judge is features else None, judge, settings.k, cache)
        duplicates = find_duplicates(
            *without_self(itself.sq_distances, itself.indices), ratio=settings.ratio, features=judge.name
        )

    group = duplicates.group if duplicates is not None and duplicates.members else None
    searched = sum(len(images) for name, images in sets.items() if name != "train")
    not_moved = "" if settings.moved else _why_not_moved(train, searched, settings, features)
    too_small = _too_small(train)
    absent = ({"moved"} if not_moved else set()) | ({"degraded"} if too_small else set())
    kinds = tuple(kind for kind in KINDS if kind not in absent)
    planted = plant(train, sets["generated"], kinds=kinds, searched=searched)
    sets["planted"] = planted.images
    rows["planted"] = extract(planted.images, features, cache, argument="planted")

    copies = {}
    for name, images in sets.items():
        if name == "train":
            continue
        versions = views(settings.invariance)
        shared: dict[str, Any] = {"features": features, "cache": cache, "argument": name}
        search = shared | {"rows": rows[name], "views": versions}
        moments = level_moments(images.pixels.flatten(2))
        squares = moments[1].sum(dim=1) if features.name == PIXELS else None
        near = nearest_references(images, references, k=settings.k, squares=squares, **search)
        distinct = None if duplicates is None else distinct_ratios(near, duplicates.group, images, references, **search)
        cosine = None
        if features.name != PIXELS:  # the direction of pixels says little
            cosine = cosine_distances(images, rows[name], references, **shared)
        moved: bool | Tensor = not not_moved
        if name == "planted":  # that search takes the most time by far: only what was moved goes through it
            moved = torch.tensor([kind == "moved" for kind in planted.kinds])
        matches = find_disguised(
            images, train, cache=cache, argument=name, device=features.device, group=group, moved=moved
        )
        copies[name] = find_copies(
            images,
            train,
            near,
            matches,
            views=versions,
            distinct=distinct,
            cosine=cosine,
            plain=features.name not in CLASS_LIKE,
            moments=moments,
        )
    copies["generated"] = measure_noise(copies["generated"], sets["generated"], train)
    control = copies.get("held_out")
    evidence = weigh(copies["generated"], control, level=settings.false_finds)
    copies = {
        name: replace(
            part,
            search=evidence.search if name == "generated" else telling_searches(part, control, evidence.noticed_below),
        )
        for name, part in copies.items()
    }
    found = copies.pop("planted")
    del sets["planted"]
    return Audit(
        settings,
        features,
        sets,
        copies,
        duplicates,
        evidence,
        planted,
        found,
        not_moved,
        TOO_SMALL if too_small else "",
    )


def _why_not_moved(train: ImageSet, searched: int, settings: Settings, features: Features) -> str:
    """Say why moved copies are not looked for unless it is asked for; nothing if they are."""
    if _too_small(train):
        return TOO_SMALL
    if settings.moved is False:
        return "it was switched off"
    seconds = SECONDS[0] * len(train) + SECONDS[1] * searched
    seconds /= GPU_TIMES if features.device != "cpu" else 1
    if seconds > AFFORDABLE:
        return f"it would take about {max(1, round(seconds / 60)):,} minutes on one core; ask for it with --moved true"
    return ""


def _too_small(train: ImageSet) -> bool:
    return min(train.pixels.shape[2:]) < LEAST_SIDE


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
                f"{_size(images)}. Say with --image-size what size to bring them all to."
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
        remedy = "Add images, or lower --k." if k > 2 else "Add images."
        raise ValueError(f"Argument `train` expected at least k = {k} images, but got {len(train)}. {remedy}")


def _within(train: ImageSet, references: References | None, features: Features, k: int, cache: BlockCache) -> Neighbors:
    """Find the training images nearest to each training image, itself among them."""
    if references is None:
        references = References.of(extract(train, features, cache, argument="train"), train.sha256)
    options: dict[str, Any] = {"k": min(k + 1, len(train)), "views": views("none"), "argument": "train"}
    squares = references.norms if references.rows.dtype == torch.uint8 else None
    options |= {"rows": references.rows, "squares": squares}
    return nearest_references(train, references, features=features, cache=cache, **options)


def same_channels(sets: Mapping[str, ImageSet]) -> dict[str, ImageSet]:
    """Repeat grey images over the channels where another set is in colour; the others stay as they are."""
    channels = max(images.pixels.shape[1] for images in sets.values())
    return {
        name: replace(images, pixels=images.pixels.expand(-1, channels, -1, -1).contiguous())
        for name, images in sets.items()
    }


def _size(images: ImageSet) -> str:
    height, width = images.pixels.shape[2:]
    return f"{width}x{height}"
