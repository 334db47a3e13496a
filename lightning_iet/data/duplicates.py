"""Repeated images in a training set: made as a stress test, found, dropped or balanced."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_iet.data.samples import name_of
from lightning_iet.functional.checks import check_at_least, unit_interval
from lightning_iet.functional.duplicates import Duplicates
from lightning_iet.utilities.files import printable, write_atomically

Change: TypeAlias = Literal["exact", "recolored", "moved"]
Duplication: TypeAlias = Literal["keep", "drop", "balance"]
"""What becomes of near-duplicates in a training set."""


def repeat_images(
    images: Tensor, *, repeated: int, repeats: int, change: Change = "recolored", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Let the first images of a set occur many times, slightly changed: a stress test of methods and measures.

    Real training sets are uneven like this: most images occur once, and some in many near-identical files.

    Args:
        images: Float in [0, 1] or uint8, shape ``(n, C, H, W)``.
        repeated: Number of images, the first ones, that occur ``repeats`` times; the others occur once.
        repeats: How often, ≥ 1; the first occurrence is the image itself.
        change: How the others differ from it: ``"exact"`` not at all; ``"recolored"`` by a brightness between 0.85 and
            1.15 and noise of standard deviation 0.02; ``"moved"`` by a shift of up to a sixteenth of the side, and a
            crop of as much on each side, scaled back.
        seed: Seed of the changes.

    Returns:
        The images, shape ``(n + repeated * (repeats - 1), C, H, W)``, and for each of them the position in ``images``
        of the image that it shows.

    Raises:
        ValueError: For numbers out of range, or an unknown change.

    Example:
        >>> images, source = repeat_images(torch.rand(3, 1, 8, 8), repeated=1, repeats=3)
        >>> images.shape, source
        (torch.Size([5, 1, 8, 8]), tensor([0, 1, 2, 0, 0]))
    """
    _check_repeats(len(images), repeated, repeats)
    if change not in get_args(Change):
        raise ValueError(f"Argument `change` expected one of {get_args(Change)}, but got {change!r}.")
    images = unit_interval(images)
    source = torch.arange(repeated).repeat_interleave(repeats - 1)
    generator = torch.Generator().manual_seed(seed)
    others = _changed(images[source], change, generator)
    return torch.cat([images, others]), torch.cat([torch.arange(len(images)), source])


def _check_repeats(images: int, repeated: int, repeats: int) -> None:
    if not 0 <= repeated <= images:
        raise ValueError(f"Argument `repeated` expected an integer from 0 to {images}, but got {repeated}.")
    check_at_least(1, repeats=repeats)


def _changed(images: Tensor, change: Change, generator: torch.Generator) -> Tensor:
    if change == "exact" or not len(images):
        return images
    number = len(images)
    if change == "recolored":
        brightness = 0.85 + 0.3 * torch.rand(number, 1, 1, 1, generator=generator)
        noise = 0.02 * torch.randn(images.shape, generator=generator)
        return (images * brightness + noise).clamp(0, 1)
    shift = (2 * torch.rand(number, 2, generator=generator) - 1) / 8  # in units of half the side
    scale = 1 - torch.rand(number, generator=generator) / 8
    theta = torch.zeros(number, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp(0, 1)


class _Rearranged(Dataset[tuple[Tensor, Any, int]]):
    """Samples at some places of a data set, in that order; nothing is read before it is asked for."""

    def __init__(self, samples: Any, places: Sequence[int] | Tensor) -> None:
        self.samples, self.places = samples, places

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        """Return the samples' own name of one, such as its file."""
        return name_of(self.samples, int(self.places[index]))

    def __getitem__(self, index: int) -> tuple[Tensor, Any, int]:
        return (*self.samples[int(self.places[index])][:-1], index)


class Repeated(_Rearranged):
    """Samples of which the first ones occur many times, in exact copies.

    Args:
        samples: Yields tuples that begin with image and condition, and end with the index.
        repeated: Number of samples, the first ones, that occur ``repeats`` times; the others occur once.
        repeats: How often, ≥ 1.

    Raises:
        ValueError: For numbers out of range.

    Example:
        >>> samples = Repeated([("cat", "a cat", 0), ("dog", "a dog", 1)], repeated=1, repeats=3)
        >>> [samples[i] for i in range(len(samples))]
        [('cat', 'a cat', 0), ('dog', 'a dog', 1), ('cat', 'a cat', 2), ('cat', 'a cat', 3)]
    """

    def __init__(self, samples: Any, *, repeated: int, repeats: int) -> None:
        _check_repeats(len(samples), repeated, repeats)
        more = (place for place in range(repeated) for _ in range(repeats - 1))
        super().__init__(samples, [*range(len(samples)), *more])


class SomeSamples(_Rearranged):
    """Samples at some places of a data set, with their classes.

    Args:
        samples: Yields tuples that begin with image and condition, and end with the index.
        places: Positions of those that are taken, shape ``(m,)``.

    Attributes:
        targets: Their classes, where the samples have classes.

    Example:
        >>> some = SomeSamples([("cat", 0, 0), ("dog", 1, 1)], torch.tensor([1]))
        >>> some[0]
        ('dog', 1, 0)
    """

    targets: Tensor

    def __init__(self, samples: Any, places: Tensor) -> None:
        super().__init__(samples, places)
        if hasattr(samples, "targets"):
            self.targets = samples.targets[places]


class OncePerGroup(Dataset[tuple[Tensor, Any, int]]):
    """Samples of which near-duplicates count as one: each item is one group, shown by one of its members at random.

    The member is drawn from torch's global generator, as flips are: under shards that is seeded for each sample and
    epoch, so that a resumed run, or one on other processes, sees the same images.

    Args:
        samples: Yields tuples that begin with image and condition, and end with the index.
        group: Number of the group of each sample, shape ``(n,)``, from 0 without gaps.

    Attributes:
        targets: Class of each group's first member, where the samples have classes.

    Raises:
        ValueError: If samples and groups differ in number.

    Example:
        >>> samples = [("cat", 0, 0), ("dog", 0, 1), ("the same dog", 0, 2)]
        >>> once = OncePerGroup(samples, torch.tensor([0, 1, 1]))
        >>> len(once), once[0], {once[1] for _ in range(99)} == {("dog", 0, 1), ("the same dog", 0, 1)}
        (2, ('cat', 0, 0), True)
    """

    targets: Tensor

    def __init__(self, samples: Any, group: Tensor) -> None:
        if len(samples) != len(group):
            raise ValueError(
                f"Argument `group` expected one number for each of {len(samples)} samples, got {len(group)}."
            )
        self.samples = samples
        self.members = [
            members.sort().values for members in group.argsort(stable=True).split(group.bincount().tolist())
        ]
        if hasattr(samples, "targets"):
            self.targets = samples.targets[torch.stack([members[0] for members in self.members])]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> tuple[Tensor, Any, int]:
        members = self.members[index]
        chosen = members[torch.randint(len(members), ())] if len(members) > 1 else members[0]
        return (*self.samples[int(chosen)][:-1], index)


class FirstOfGroups(SomeSamples):
    """Samples without their near-duplicates: of each group the first member alone.

    Args:
        samples: Yields tuples that begin with image and condition, and end with the index.
        group: Number of the group of each sample, shape ``(n,)``.

    Attributes:
        places: Positions of the samples that are left, ascending.
        targets: Their classes, where the samples have classes.

    Example:
        >>> first = FirstOfGroups([("cat", 0, 0), ("dog", 0, 1), ("the same cat", 0, 2)], torch.tensor([0, 1, 0]))
        >>> [first[i] for i in range(len(first))]
        [('cat', 0, 0), ('dog', 0, 1)]
    """

    def __init__(self, samples: Any, group: Tensor) -> None:
        if len(samples) != len(group):
            raise ValueError(
                f"Argument `group` expected one number for each of {len(samples)} samples, but got {len(group)}."
            )
        every = torch.arange(len(group))
        first = torch.full((int(group.max()) + 1,), len(group)).scatter_reduce(0, group, every, "amin")
        super().__init__(samples, first[first < len(group)].sort().values)


def images_of(samples: Any) -> Tensor:
    """Return the images of a data set whose samples begin with one, uint8 or as they are, shape ``(n, C, H, W)``."""
    if hasattr(samples, "images"):
        return torch.as_tensor(samples.images)
    return torch.stack([samples[index][0] for index in range(len(samples))])


def write_groups(found: Duplicates, names: Sequence[str], file: Path) -> None:
    """Write ``duplicates.csv``: every image that has a near-duplicate, with its group and whether dropping keeps it.

    The folder of the file is made if need be.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(file) as path, path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["group", "images", "name", "kept_by_drop"])
        for number, group in enumerate(found.members):
            for place, index in enumerate(group):
                writer.writerow([number, len(group), printable(names[index]), int(place == 0)])
