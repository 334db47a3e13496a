"""The training images nearest to every image of a set."""

from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_iet.audit.cache import BlockCache, Progress, in_blocks, part_of
from lightning_iet.audit.comparability import contents, first_of
from lightning_iet.audit.features import PIXELS, Features, check_finite
from lightning_iet.audit.reading import ImageSet
from lightning_iet.functional import duplicates
from lightning_iet.functional.average_minimum_distance import nearest_cosine_distance, unit_rows
from lightning_iet.functional.exhaustive_neighbors import level_moments, squared_norms
from lightning_iet.functional.memorization import distinct_ratio, nearest_ratio
from lightning_iet.functional.neighbors import search_rows
from lightning_iet.utilities.fingerprints import digest, tensor_bytes

Invariance: TypeAlias = Literal["none", "flip", "shift", "flip+shift"]
View: TypeAlias = Callable[[Tensor], Tensor]


def views(invariance: Invariance) -> Mapping[str, View]:
    """List the versions in which a generated image is compared with the training images.

    Each costs a search of its own, so that ``"flip"`` doubles the time, ``"shift"`` takes 9 times and both 18 times as
    long.

    Args:
        invariance: ``"flip"`` adds the mirrored image, ``"shift"`` the 8 shifts by one pixel, with the border repeated
            *(our choice: no frame of black appears)*.

    Returns:
        By name a function on images, shape ``(N, C, H, W)``; the first leaves them as they are.

    Example:
        >>> list(views("flip")), len(views("flip+shift"))
        (['as it is', 'mirrored'], 18)
    """
    versions: dict[str, View] = {"as it is": lambda images: images}
    if "flip" in invariance:
        versions["mirrored"] = lambda images: images.flip(-1)
    if "shift" not in invariance:
        return versions
    moves = [(dx, dy) for dx in (0, -1, 1) for dy in (0, -1, 1)]
    return {_name(name, *move): _shifted(view, *move) for name, view in versions.items() for move in moves}


def _name(name: str, dx: int, dy: int) -> str:
    if not (dx or dy):
        return name
    shift = f"shifted by ({dx}, {dy})"
    return shift if name == "as it is" else f"{name}, {shift}"


def _shifted(view: View, dx: int, dy: int) -> View:
    def shift(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = F.pad(view(images).float(), (1, 1, 1, 1), mode="replicate").to(images.dtype)
        return padded[..., 1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width]

    return shift if dx or dy else view


VERSION = 3  # of the searches below: raised with every change of what they find
BLOCK = 4096  # images that are searched for together, for references are prepared anew for every block
TRIED = 128, 256  # images, and references, by which the time is measured, where there are 50 times as many pairs …
ENOUGH = 0.05  # … again and again, for so many seconds at least


class Neighbors(NamedTuple):
    """The ``k`` nearest of each of ``Q`` images, nearest first.

    Attributes:
        sq_distances: squared l2 distances, float32, shape ``(Q, k)``.
        indices: positions of the references, int64, shape ``(Q, k)``.
        views: which version of the image is the nearest to that reference, int64, shape ``(Q, k)``.
    """

    sq_distances: Tensor
    indices: Tensor
    views: Tensor


class References(NamedTuple):
    """The images among which neighbours are searched.

    Attributes:
        rows: their features, shape ``(N, D)``.
        norms: squared l2 norms of the rows, shape ``(N,)``; of pixels ``level_moments(rows)[1]``.
        sha256: hash of the images.
    """

    rows: Tensor
    norms: Tensor
    sha256: str

    @property
    def made_of(self) -> tuple[object, ...]:
        """What they are told apart by: a grey set repeated over channels has the hash of the grey one."""
        return self.sha256, *self.rows.shape

    @classmethod
    def of(cls, rows: Tensor, sha256: str) -> "References":
        """Prepare rows for many searches."""
        return cls(rows, level_moments(rows)[1] if rows.dtype == torch.uint8 else squared_norms(rows), sha256)


def nearest_references(
    images: ImageSet,
    references: References,
    *,
    k: int,
    features: Features,
    views: Mapping[str, View],
    cache: BlockCache,
    argument: str,
    rows: Tensor | None = None,
    squares: Tensor | None = None,
) -> Neighbors:
    """Find the ``k`` nearest references of every image; of its versions, the one nearest to a reference counts.

    Args:
        images: the images to search for.
        references: the images to search among.
        k: neighbours per image.
        features: what distances are measured in.
        views: versions of an image, as :func:`~lightning_iet.audit.search.views`.
        cache: where finished blocks go.
        argument: what the images are, for messages.
        rows: features of the images as they are, if at hand, shape ``(Q, D)``.
        squares: of pixels ``level_moments(rows)[1]``, if at hand.

    Returns:
        The neighbours, on the CPU.

    Raises:
        ValueError: if features are not finite.
    """

    def search(place: slice, progress: Progress) -> dict[str, Tensor]:
        found = []
        for number, view in enumerate(views.values()):
            part = features.rows(view(images.pixels[place])) if rows is None or number else rows[place]
            check_finite(part, images.names[place], argument=argument, name=features.name)
            show = part_of(progress, start=number * len(part) / len(views), scale=1 / len(views))
            own = None if squares is None or number else squares[place]
            norms = references.norms
            sq_distances, indices = search_rows(
                part, references.rows, k, norms=norms, squares=norms, own_squares=own, progress=show
            )
            found.append(Neighbors(sq_distances, indices, torch.full_like(indices, number)))
        nearest = found[0] if len(found) == 1 else _merge(found, k)
        return {name: tensor.cpu() for name, tensor in nearest._asdict().items()}

    blocks = in_blocks(
        f"Comparing {argument} images",
        _keys(images, references.made_of, k, features, views),
        search,
        cache=cache,
        total=len(images),
        block=BLOCK,
    )
    return Neighbors(*(torch.cat([block[name] for block in blocks]) for name in Neighbors._fields))


def distinct_ratios(
    near: Neighbors,
    group: Tensor,
    images: ImageSet,
    references: References,
    *,
    rows: Tensor,
    features: Features,
    views: Mapping[str, View],
    cache: BlockCache,
    argument: str,
) -> Tensor:
    """Compare the nearest reference of each image with the nearest one that shows something else.

    Images all of whose neighbours are near-duplicates of one another are searched for again, among more neighbours,
    equal ones once: black slices are many.

    Args:
        near: what :func:`nearest_references` found of the ``Q`` images.
        group: number of the group of each reference, shape ``(N,)``.
        images: the images.
        references: the images that were searched among.
        rows: features of the images, shape ``(Q, D)``.
        features: as :func:`nearest_references`, and so are ``views``, ``cache`` and ``argument``.
        views: versions of an image.
        cache: where finished blocks go.
        argument: what the images are, for messages.

    Returns:
        :func:`~lightning_iet.functional.memorization.distinct_ratio`, shape ``(Q,)``; where all references are of one
        group, the farthest of them stands for the others.
    """
    ratios = distinct_ratio(near.sq_distances, near.indices, group)
    members, known = group[near.indices], near.indices.shape[1]
    alike = (members == members[:, :1]).all(dim=1).nonzero().flatten()
    if not len(alike) or known == len(group):
        return ratios
    chosen, number = first_of(contents(images.pixels[alike])).unique(return_inverse=True)
    left = alike[chosen]
    is_one = bool((group == group[0]).all())
    block = min(BLOCK, max(1, duplicates.LISTED // len(group))) if is_one else BLOCK

    def search(place: slice, progress: Progress) -> dict[str, Tensor]:
        chosen = left[place]
        names = [images.names[index] for index in chosen.tolist()]

        def versions() -> Iterator[Tensor]:
            for number, view in enumerate(views.values()):
                part = features.rows(view(images.pixels[chosen])) if number else rows[chosen.to(rows.device)]
                check_finite(part, names, argument=argument, name=features.name)
                yield part
                progress((number + 1) * len(part) // len(views))

        if is_one:
            pairs = _nearest_and_farthest(versions(), references)
        else:
            pairs = _nearest_of_two_groups(versions(), references, group, width=duplicates.WIDER * known)
        return {"ratios": nearest_ratio(pairs).cpu()}

    settings = (features.name, features.sha256, *views, *references.made_of, images.sha256, *images.pixels.shape)
    made_of = digest(*settings, *left.tolist(), tensor_bytes(group))
    blocks = in_blocks(
        f"Comparing {argument} images with what shows something else",
        [digest("distinct", VERSION, known, made_of, start) for start in range(0, len(left), block)],
        search,
        cache=cache,
        total=len(left),
        block=block,
    )
    ratios[alike] = torch.cat([block["ratios"] for block in blocks])[number]
    return ratios


def _nearest_of_two_groups(versions: Iterator[Tensor], references: References, group: Tensor, *, width: int) -> Tensor:
    """Return the squared distances to the nearest reference of all versions, and to the nearest of another group.

    Of each version the nearest, and the nearest of another group than that, are enough for it.
    """
    rows, norms = references.rows, references.norms
    group = group.to(rows.device)
    found = [
        duplicates.nearest_of_two_groups(part, rows, group, norms=norms, squares=norms, width=width)
        for part in versions
    ]
    distances, indices = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    first, nearest = distances.min(dim=1, keepdim=True)
    members = group[indices]
    others = distances.masked_fill(members == members.gather(1, nearest), torch.inf)
    return torch.cat([first, others.amin(dim=1, keepdim=True)], dim=1)


def _nearest_and_farthest(versions: Iterator[Tensor], references: References) -> Tensor:
    """Return the squared distances to the nearest reference, and to the one that is the farthest of all versions."""
    rows, norms = references.rows, references.norms
    least = rows.new_full((), torch.inf, dtype=torch.float32)
    for part in versions:
        distances, indices = search_rows(part, rows, len(rows), norms=norms, squares=norms)
        least = torch.minimum(least, torch.empty_like(distances).scatter_(1, indices, distances))
    return torch.stack([least.amin(dim=1), least.amax(dim=1)], dim=1)


def _keys(
    images: ImageSet, made_of: tuple[object, ...], k: int, features: Features, views: Mapping[str, View]
) -> list[str]:
    settings = (features.name, features.sha256, k, *views, *made_of, images.sha256, *images.pixels.shape)
    return [digest("neighbors", VERSION, *settings, start) for start in range(0, len(images), BLOCK)]


def comparison_seconds(
    sets: Mapping[str, ImageSet], features: Features, cache: BlockCache, *, k: int, invariance: Invariance, within: bool
) -> float:
    """Measure on a few images about how long it will take at most to compare all images by their pixels.

    It takes less where short codes of images rule most pairs out, see
    :mod:`~lightning_iet.functional.pruned_neighbors`.

    Args:
        sets: ``"train"`` and other images, with the channels with which they are compared.
        features: what distances are measured in.
        cache: where finished blocks go; those that are there take no time.
        k: neighbours per image.
        invariance: versions of an image that are compared.
        within: whether training images are compared with one another as well.

    Returns:
        Seconds; 0 where there is little to compare, and of a network's features, whose comparison takes little.
    """
    train = sets["train"]
    if features.name != PIXELS:
        return 0.0
    made_of, missing = (train.sha256, len(train), train.pixels[0].numel()), 0
    for name, images in sets.items():
        neighbours, versions = (min(k + 1, len(train)), views("none")) if name == "train" else (k, views(invariance))
        for number, key in enumerate(_keys(images, made_of, neighbours, features, versions)):
            if (name != "train" or within) and key not in cache:
                missing += len(versions) * min(BLOCK, len(images) - number * BLOCK)
    few = features.rows(train.pixels[: TRIED[1]])
    if missing * len(train) < 50 * min(TRIED[0], len(few)) * len(few):
        return 0.0
    norms = level_moments(few)[1]
    search_rows(few[: TRIED[0]], few, 1, squares=norms)  # the first search prepares what the others use again
    start, pairs, seconds = perf_counter(), 0, 0.0
    while seconds < ENOUGH:
        search_rows(few[: TRIED[0]], few, 1, squares=norms)[0].cpu()
        pairs, seconds = pairs + len(few[: TRIED[0]]) * len(few), perf_counter() - start
    return seconds / pairs * missing * len(train)


def cosine_distances(
    images: ImageSet, rows: Tensor, references: References, *, features: Features, cache: BlockCache, argument: str
) -> Tensor:
    """Measure the cosine distance of every image to the reference nearest in direction.

    Args:
        images: the ``Q`` images.
        rows: their features, shape ``(Q, D)``.
        references: the images to search among.
        features: what the rows are.
        cache: where finished blocks go.
        argument: what the images are, for the bar.

    Returns:
        Shape ``(Q,)``, in [0, 2], on the CPU.
    """
    train = unit_rows(references.rows)
    norms = train.square().sum(dim=1)
    settings = (features.name, features.sha256, *references.made_of, images.sha256, *images.pixels.shape)
    blocks = in_blocks(
        f"Comparing directions of {argument} images",
        [digest("cosine", VERSION, *settings, start) for start in range(0, len(images), BLOCK)],
        lambda place, _: {"distances": nearest_cosine_distance(unit_rows(rows[place]), train, norms=norms).cpu()},
        cache=cache,
        total=len(images),
        block=BLOCK,
    )
    return torch.cat([block["distances"] for block in blocks])


def _merge(found: list[Neighbors], k: int) -> Neighbors:
    """Join the lists of all versions: each reference once, at its least distance.

    A reference among the ``k`` nearest of all versions is among the ``k`` nearest of the version that it is nearest to.
    """
    joined = Neighbors(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))
    joined = _take(joined, joined.sq_distances.sort(dim=1, stable=True).indices)
    joined = _take(joined, joined.indices.sort(dim=1, stable=True).indices)
    again = joined.indices[:, 1:] == joined.indices[:, :-1]
    joined.sq_distances[:, 1:].masked_fill_(again, torch.inf)
    return _take(joined, joined.sq_distances.sort(dim=1, stable=True).indices[:, :k])


def _take(neighbors: Neighbors, order: Tensor) -> Neighbors:
    return Neighbors(*(tensor.gather(1, order) for tensor in neighbors))
