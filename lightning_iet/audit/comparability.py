"""Whether sets of images can be compared at all: a copy in another range, or over another background, is not seen."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from statistics import median_low
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import fisher_exact, kstwo
from torch import Tensor

from lightning_iet.audit.reading import ImageSet
from lightning_iet.data.decoding import WINDOWED
from lightning_iet.utilities.fingerprints import tensor_bytes

DIFFERENT = 0.6  # Kolmogorov-Smirnov distance: so large a share of one set lies where the other one is not
FEW_PIXELS = 64  # values of an image by which it is told from most others
DIFFERENT_TOGETHER = 0.45  # likewise, of what a range changes, where three of these four properties differ so much
DIFFERENT_DEPTH = 0.3  # likewise, of what a range changes, where one set alone has a range that was found out
TIMES = 2.0  # how much farther apart than held-out and training images
FEW_LEVELS = 64
FEWER = 0.5  # grey levels in a generated image, as a part of those in a training image, from which on they are no fault
SAMPLE = 2000  # images of each set that are looked at, spread evenly
_VALUES = 2**24  # of images that are measured together
UNLIKELY = 1e-3  # p-value of the distance, so that small sets do not differ by chance
RESHAPED = 0.1  # share of generated images that were brought to another shape, above which copies may go unseen
SAME_SHAPE = 0.02  # relative difference of two shapes (width over height) that says nothing
FEW_IMAGES = 20  # generated images below which transparency of more than a tenth counts without a test
TRANSPARENT = 0.1  # by how much the shares of images with transparency differ, above which copies may go unseen
NEARLY = 16  # steps of 255 from black or white that are taken for it: generators draw a little noise over a background
OUTER = 0.02  # share of an image's pixels at each end that is left aside when its range is measured
NOISY = 2.0  # sharpness from which on images look like noise, if training images do not: of white noise it is 3.6
SHARPER = 1.5  # how much sharper than training images such images are
FARTHER = 1.5  # how much farther from training images than held-out images generated ones lie, to be spoken of


@dataclass(frozen=True)
class Difference:
    """A property in which generated, or held-out, images differ from training images.

    Attributes:
        name: The property.
        generated: Its median, or its value; of the shape the median of those that have another one.
        train: Likewise; of :data:`FAR` that of held-out images.
        distance: Kolmogorov-Smirnov distance of the two distributions; 1 where it is a fact of the whole set; of the
            shape the share of generated images that have another one.
        control: Distance of held-out from training images; without held-out images, or where these differ themselves,
            of two halves of the training images.
        remedy: What to do about it.
        compared: Which images differ; ``generated`` is the median of these.
        more: What to do where the command does not take the options that the remedy names, a sentence each.
    """

    name: str
    generated: float
    train: float
    distance: float
    control: float
    remedy: str
    compared: Literal["generated", "held_out"] = "generated"
    more: tuple[str, ...] = ()


LEVELS = "grey levels in an image"
OF_FILES = TRANSPARENCY, LEVELS_OF_SET, SHAPE = "transparency", "grey levels in the set", "width over height"
"""Facts of how files were stored."""
OCCUPIED = "occupied range"
CUT_OFF = "share of black and white pixels"
OF_RANGE = "brightness", "contrast", OCCUPIED, CUT_OFF
"""What reading values in another range changes."""
OF_COLOURS = "colourfulness", "red against green", "blue against yellow"
"""What is measured of images in colour; the searches for disguised copies are in grey."""
SHARPNESS = "sharpness"
NOISE = "noise"
"""The name of a difference in sharpness where generated images look like noise."""
FAR = "distance to the nearest training image"
_SCALED = "If they were scaled in another way, say so with --range."
_REMEDIES = {
    "brightness": _SCALED,
    "contrast": _SCALED,
    OCCUPIED: _SCALED,
    CUT_OFF: "Values may have been cut off, as a DICOM file's window does: say what is black and white with --range "
    "LOW:HIGH, or --range full.",
    LEVELS: "Files of more than 8 bits may have been read in the wrong range: say it with --range.",
    SHARPNESS: "If they were enlarged, bring all images to the smaller size with --image-size.",
    **dict.fromkeys(OF_COLOURS, "Give all sets in the same colours, or leave colours aside with --grey."),
    FAR: "They show, or went through, something else: check the paths, --range, --background and --fit.",
}

_TRAIN_LONGER = "Train longer, or draw in more steps (--num-inference-steps where they are drawn), then audit again."
_SCALED_OR_SAVED = "If they were scaled or saved in another way, say so with --range or --background."
_SAVED = "If they were saved over another colour, say so with --background."
_EIGHT_BITS = (
    "All files have 8 bits, which no range changes: give images as they were generated; a model that draws noise is "
    "not trained yet."
)
_FEW_COLOURS = (
    "They may have been stored in few colours, as GIF and palette PNG do: give them as they were generated, or bring "
    "all images to half their size with --image-size, which mixes neighbouring colours to shades."
)


def compare_sets(sets: Mapping[str, ImageSet]) -> list[Difference]:
    """Look for properties in which generated and training images differ more than real images do among themselves.

    Of every image: mean, standard deviation, occupied range (between its 2nd and 98th percentile), share of pixels
    that are nearly black or white, number of grey levels, sharpness (mean absolute Laplacian over the standard
    deviation); where both sets are in colour, colourfulness (mean standard deviation over the channels) and mean tint
    (red against green, blue against yellow). Two distributions differ if their Kolmogorov-Smirnov distance is at least
    0.6, beyond chance *(our choice: a generator of middling quality must pass, a wrong range must not)*. Where one of
    the sets alone has a range that was found out, from the values of deep files or the window of DICOM files, 0.3 is
    enough for what a range changes: then there is a cause to suspect. And 0.45 is enough where three of the four
    properties that a range changes differ by so much. Of such smaller distances only those count that are twice as
    large as that of held-out and training images.

    Held-out images are compared with training images as well. Where they differ by 0.6, or by 0.3 of what a range
    changes where one of the two alone has a range that was found out, they are no control, here or elsewhere; then
    halves of the training images are.

    Args:
        sets: ``"generated"``, ``"train"`` and perhaps ``"held_out"`` images.

    Returns:
        The differences, the largest first.

    Example:
        >>> from lightning_iet.audit.reading import image_set
        >>> train, generated = torch.randint(256, (200, 1, 8, 8), dtype=torch.uint8).split(100)
        >>> sets = {"train": image_set(train, location=""), "generated": image_set(generated // 16, location="")}
        >>> {difference.name for difference in compare_sets(sets)} >= {"brightness", "contrast"}
        True
    """
    sample = {name: images.pixels[:: max(1, -(-len(images) // SAMPLE))].cpu() for name, images in sets.items()}
    found = {name: properties(pixels) for name, pixels in sample.items()}
    grey = {name: bool((pixels == pixels[:, :1]).all()) for name, pixels in sample.items()}
    train = found["train"]
    halves = {name: _distance(values[::2], values[1::2]) for name, values in train.items()}

    def apart(compared: Literal["generated", "held_out"], controls: Mapping[str, float]) -> dict[str, float]:
        distances = {}
        for name, values in found[compared].items():
            if name in OF_COLOURS and (grey[compared] or grey["train"]):
                continue  # the searches are in grey
            if name == LEVELS and values.median() >= FEWER * train[name].median():
                continue  # a generator of smooth shades may be trained on images of few, and palettes take some of many
            distance = _distance(values, train[name])
            least = min(TIMES * controls[name], DIFFERENT)
            if distance >= least and _p_value(distance, len(values), len(train[name])) < UNLIKELY:
                distances[name] = distance
        return distances

    def described(
        compared: Literal["generated", "held_out"], distances: Mapping[str, float], controls: Mapping[str, float]
    ) -> list[Difference]:
        medians = {name: (float(found[compared][name].median()), float(train[name].median())) for name in distances}
        return [
            Difference(name, *medians[name], distance, controls[name], _remedy(name, sets), compared)
            for name, distance in distances.items()
        ]

    controls, no_control = halves, []
    if "held_out" in found:
        read_otherwise = _ranges_unlike(sets["held_out"], sets["train"])
        least = dict.fromkeys(OF_RANGE, DIFFERENT_DEPTH if read_otherwise else DIFFERENT)
        away = {name: d for name, d in apart("held_out", halves).items() if d >= least.get(name, DIFFERENT)}
        no_control = described("held_out", away, halves)
        useless = {*away, *(OF_RANGE if read_otherwise else ())}
        controls = {
            name: halves[name] if name in useless else _distance(found["held_out"][name], train[name]) for name in train
        }
    distances = apart("generated", controls)
    of_range = _least_of_range(sets, [distances[name] for name in OF_RANGE if name in distances])
    distances = {name: d for name, d in distances.items() if d >= (of_range if name in OF_RANGE else DIFFERENT)}
    differences = [*_of_whole_sets(sets), *described("generated", distances, controls)]
    # Of equal distances what is known of the files, for it is the cause.
    return sorted(differences + no_control, key=lambda difference: -difference.distance)


def compare_distances(generated: Tensor, held_out: Tensor) -> list[Difference]:
    """Tell whether generated images lie much farther from training images than held-out images do.

    They do if their median is 1.5 times as large and the Kolmogorov-Smirnov distance at least 0.6, beyond chance *(our
    choice)*: so far away are images of another kind, with a frame or in other places, but seldom those of a poor
    generator.

    Args:
        generated: Distances to the nearest training image, shape ``(Q,)``.
        held_out: Likewise.

    Example:
        >>> near = torch.linspace(1, 2, 50)
        >>> len(compare_distances(2 * near, near)), len(compare_distances(1.2 * near, near))
        (1, 0)
    """
    medians = float(generated.median()), float(held_out.median())
    distance = _distance(generated, held_out)
    if medians[0] < FARTHER * medians[1] or distance < DIFFERENT:
        return []
    if _p_value(distance, len(generated), len(held_out)) >= UNLIKELY:
        return []
    return [Difference(FAR, *medians, distance, 0.0, _REMEDIES[FAR])]


def explained_by_noise(differences: Sequence[Difference]) -> list[Difference]:
    """Put noise first where the generated images look like it: then options of reading mend no difference.

    They do if their median sharpness is at least 2, and 1.5 times that of the training images *(our choice)*; of white
    noise it is 3.6, of photographs below 1.

    Args:
        differences: Those of :func:`compare_sets` and :func:`compare_distances`.

    Returns:
        The same; where there is noise, the difference in sharpness is named so and stands first, and what to do about
        generated images is to train longer, except for how files were stored.

    Example:
        >>> sharp = Difference(SHARPNESS, 3.5, 0.8, 1.0, 0.1, "Enlarge.")
        >>> dark = Difference("brightness", 120.0, 60.0, 1.0, 0.1, "Say so with --range.")
        >>> [part.name for part in explained_by_noise([dark, sharp])]
        ['noise', 'brightness']
    """

    def is_noise(part: Difference) -> bool:
        is_drawn = part.compared == "generated" and part.name == SHARPNESS
        return is_drawn and part.generated >= max(NOISY, SHARPER * part.train)

    noise = [replace(part, name=NOISE) for part in differences if is_noise(part)]
    # Dithered images are as sharp as noise, but of few grey levels.
    if not noise or any(part.name == LEVELS_OF_SET for part in differences):
        return list(differences)
    return [
        part if part.compared == "held_out" or part.name in OF_FILES else replace(part, remedy=_TRAIN_LONGER, more=())
        for part in [*noise, *(part for part in differences if not is_noise(part))]
    ]


def with_refused(difference: Difference, refused: Mapping[str, str]) -> Difference:
    """Say what to do where a remedy names options that the command does not take.

    Args:
        difference: What differs.
        refused: By option, such as ``"--grey"``, a sentence that says what to do instead.

    Returns:
        The difference with these sentences, each once.

    Example:
        >>> difference = Difference("colourfulness", 1.0, 2.0, 0.7, 0.1, "Leave colours aside with --grey.")
        >>> with_refused(difference, {"--grey": "Give all sets in grey."}).more
        ('Give all sets in grey.',)
    """
    more = dict.fromkeys(sentence for option, sentence in refused.items() if option in difference.remedy)
    return replace(difference, more=tuple(more))


def properties(pixels: Tensor) -> dict[str, Tensor]:
    """Measure properties of every image.

    Args:
        pixels: uint8, shape ``(N, C, H, W)``.

    Returns:
        By name, shape ``(N,)`` each; brightness, contrast, range and colours in units of 0 to 255.

    Example:
        >>> properties(torch.tensor([[[[0, 255], [255, 0]]]], dtype=torch.uint8))["brightness"]
        tensor([127.5000])
    """
    block = max(1, _VALUES // max(1, pixels[:1].numel()))
    if len(pixels) > block:  # so that many large images take no more memory than a few
        parts = [properties(part) for part in pixels.split(block)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    values = pixels.float()
    grey = values.mean(dim=1, keepdim=True)
    spread = grey.flatten(1).std(dim=1, unbiased=False)
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    around = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
    edges = (around - 4 * grey).abs().flatten(1).mean(dim=1)
    ordered = pixels[:, 0].flatten(1).sort(dim=1).values
    size, outside = grey[0].numel(), int(OUTER * (grey[0].numel() - 1))
    low, high = (grey.flatten(1).kthvalue(place, dim=1).values for place in (1 + outside, size - outside))
    # Channel by channel: a tenth of the time of a standard deviation over channels.
    varied = torch.zeros_like(grey[:, 0])
    for channel in values.unbind(dim=1):
        varied += (channel - grey[:, 0]).square()
    red, green, blue = values.flatten(2).mean(dim=2).expand(-1, 3).unbind(dim=1)
    return {
        "brightness": grey.flatten(1).mean(dim=1),
        "contrast": spread,
        OCCUPIED: high - low,
        CUT_OFF: ((grey <= NEARLY) | (grey >= 255 - NEARLY)).flatten(1).float().mean(dim=1),
        LEVELS: 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1).float(),
        SHARPNESS: torch.where(spread > 0, edges / spread.clamp(min=1e-6), 0),
        "colourfulness": (varied / pixels.shape[1]).sqrt().flatten(1).mean(dim=1),
        "red against green": red - green,
        "blue against yellow": blue - (red + green) / 2,
    }


def count_levels(pixels: Tensor) -> int:
    """Count the levels that occur in any image.

    Image by image, since 8-byte integers of all are too many, and until all 256 have been seen.

    Example:
        >>> count_levels(torch.tensor([0, 7, 7, 255], dtype=torch.uint8).view(2, 1, 1, 2))
        3
    """
    occurs = torch.zeros(256, dtype=torch.bool)
    for image in pixels:
        occurs |= torch.bincount(image.flatten(), minlength=256) > 0
        if occurs.all():
            break
    return int(occurs.sum())


def _of_whole_sets(sets: Mapping[str, ImageSet]) -> list[Difference]:
    """Differences in the number of grey levels, in transparency and in shape, which are those of files."""
    found = []
    shares = {name: s.origin.transparent / len(s) for name, s in sets.items()}
    difference = abs(shares["generated"] - shares["train"])
    few = len(sets["generated"]) < FEW_IMAGES  # which never differ by more than chance, and may be copies all the same
    # Images that a model has just drawn were not read, and have none.
    is_said = any(sets[name].origin.background is not None for name in ("generated", "train"))
    table = [[s.origin.transparent, len(s) - s.origin.transparent] for s in (sets["generated"], sets["train"])]
    if not is_said and difference > TRANSPARENT and (few or fisher_exact(table).pvalue < UNLIKELY):
        remedy = "Say with --background white or black what colour the generator saw under transparent pixels."
        found.append(Difference(TRANSPARENCY, shares["generated"], shares["train"], 1.0, 0.0, remedy))
    shapes, train = _shapes(sets["generated"]), _median(_shapes(sets["train"]))
    target = sets["generated"].pixels.shape[3] / sets["generated"].pixels.shape[2]
    # Training images may have been fitted to the generator's shape, but not these to another one.
    other = [(shape, count) for shape, count in shapes if _differ(shape, target) and _differ(shape, train)]
    reshaped = sum(count for _, count in other) / sum(count for _, count in shapes)
    if reshaped > RESHAPED:
        remedy = "Give the size of the generated images with --image-size, so that only the others change their shape."
        found.append(Difference(SHAPE, _median(other), train, reshaped, 0.0, remedy))
    levels = {name: count_levels(s.pixels) for name, s in sets.items()}
    if levels["generated"] < min(FEW_LEVELS, levels["train"] / 4):
        remedy = _remedy_of_levels(sets)
        found.append(Difference(LEVELS_OF_SET, levels["generated"], levels["train"], 1.0, 0.0, remedy))
    return found


def _least_of_range(sets: Mapping[str, ImageSet], distances: Sequence[float]) -> float:
    """Return the distance that is enough for properties that a range changes, given the distances of these."""
    if _ranges_unlike(sets["generated"], sets["train"]):
        return DIFFERENT_DEPTH
    return DIFFERENT_TOGETHER if sum(distance >= DIFFERENT_TOGETHER for distance in distances) >= 3 else DIFFERENT


def _ranges_unlike(generated: ImageSet, train: ImageSet) -> bool:
    """Tell whether most images of one set have a range that was found out, and most of the other one have not."""
    found = [
        2 * (images.origin.kinds.get(WINDOWED, 0) + images.origin.range_found * images.origin.deep) > len(images)
        for images in (generated, train)
    ]
    return found[0] != found[1]


def _shapes(images: ImageSet) -> list[tuple[float, int]]:
    """Width over height of the images as they were stored, ascending, and the number of images of each."""
    sizes = images.origin.sizes or {f"{images.pixels.shape[3]}x{images.pixels.shape[2]}": 1}
    return sorted(
        (int(width) / int(height), count) for size, count in sizes.items() for width, height in [size.split("x")]
    )


def _median(shapes: Sequence[tuple[float, int]]) -> float:
    return median_low(shape for shape, count in shapes for _ in range(count))


def _differ(one: float, other: float) -> bool:
    return abs(one - other) > SAME_SHAPE * min(one, other)


def _remedy(name: str, sets: Mapping[str, ImageSet]) -> str:
    """Name the options that can mend a difference, of these files: a range changes none of 8 bits."""
    if name == LEVELS:
        return _remedy_of_levels(sets)
    known = bool(sets["train"].origin.kinds)  # where training images come from no files, nobody knows what they were
    ranged = not known or any(
        images.origin.deep or {WINDOWED, "DICOM"} & images.origin.kinds.keys() for images in sets.values()
    )
    if name == "brightness" and (not known or any(images.origin.transparent for images in sets.values())):
        return _SCALED_OR_SAVED if ranged else _SAVED
    return _EIGHT_BITS if name in OF_RANGE and not ranged else _REMEDIES[name]


def _remedy_of_levels(sets: Mapping[str, ImageSet]) -> str:
    """A range is to blame only where there are files of more than 8 bits."""
    return _REMEDIES[LEVELS] if any(images.origin.deep for images in sets.values()) else _FEW_COLOURS


def unvaried(images: ImageSet) -> tuple[int, int]:
    """Count the images of one colour, and of the others those that equal an earlier one of the set.

    Example:
        >>> from lightning_iet.audit.reading import image_set
        >>> unvaried(image_set(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), location=""))
        (3, 0)
    """
    blank = one_colour(images.pixels)
    varied = contents(images.pixels)[~blank]
    return int(blank.sum()), len(varied) - len(varied.unique())


def one_colour(pixels: Tensor) -> Tensor:
    """Tell which images show one colour only.

    Args:
        pixels: shape ``(N, C, H, W)``.

    Returns:
        Bool, shape ``(N,)``.

    Example:
        >>> red = torch.tensor([255, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
        >>> one_colour(red)
        tensor([True])
    """
    flat = pixels.flatten(2)
    return (flat.amax(dim=2) == flat.amin(dim=2)).all(dim=1)


def contents(pixels: Tensor) -> Tensor:
    """Return a number for each image of a set, by which images that are equal in every pixel are known.

    Of most images a hash of a few pixels is enough, since no other image has the same ones.

    Args:
        pixels: uint8, shape ``(N, C, H, W)``.

    Returns:
        64 bits of a hash, int64, shape ``(N,)``.

    Example:
        >>> len(contents(torch.tensor([0, 1, 0]).view(3, 1, 1, 1)).unique())
        2
    """
    rows = pixels.cpu().flatten(1)
    few = few_pixels(rows)
    found = _hashes(few.unbind())
    _, number, counts = found.unique(return_inverse=True, return_counts=True)
    again = counts[number] > 1
    if few.shape[1] < rows.shape[1]:
        found[again] = _hashes(rows[place] for place in again.nonzero().flatten().tolist())
    return found


def few_pixels(pixels: Tensor) -> Tensor:
    """Return at most 64 values of each image, spread evenly, by which it is told from most others; shape ``(N, F)``.

    Example:
        >>> few_pixels(torch.arange(200).view(1, 2, 10, 10))[0, :3]
        tensor([0, 4, 8])
    """
    rows = pixels.flatten(1)
    return rows[:, :: -(-max(1, rows.shape[1]) // FEW_PIXELS)]


def first_of(content: Tensor) -> Tensor:
    """Return of each image the position of the first that equals it, by :func:`contents`, shape ``(N,)``.

    Example:
        >>> first_of(torch.tensor([7, 3, 7, 3, 5]))
        tensor([0, 1, 0, 1, 4])
    """
    _, groups = content.unique(return_inverse=True)
    first = torch.full_like(groups, len(content)).scatter_reduce(0, groups, torch.arange(len(content)), "amin")
    return first[groups]


def _hashes(rows: Iterable[Tensor]) -> Tensor:
    hashes = (blake2b(tensor_bytes(row), digest_size=8).digest() for row in rows)
    return torch.tensor([int.from_bytes(found, "little", signed=True) for found in hashes], dtype=torch.int64)


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the Kolmogorov-Smirnov distance of two samples: 0 where one is empty."""
    if not min(len(one), len(other)):
        return 0.0
    both = np.concatenate([one.numpy(), other.numpy()])
    shares = [np.searchsorted(np.sort(part.numpy()), both, side="right") / len(part) for part in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


def _p_value(distance: float, *sizes: int) -> float:
    """Return the asymptotic p-value of such a distance between two samples of these sizes (Smirnov).

    It takes most of the time of a test, and is not asked for where the distance is small.
    """
    size = round(math.prod(sizes) / sum(sizes)) if any(sizes) else 0
    return float(np.clip(kstwo.sf(distance, size), 0, 1)) if size else 1.0
