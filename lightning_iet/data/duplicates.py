"""Repeated images in a training set: made as a stress test, found, dropped or balanced."""

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

Change: TypeAlias = Literal["exact", "recolored", "moved"]


def repeat_images(
    images: Tensor, *, repeated: int, repeats: int, change: Change = "recolored", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Let the first images of a set occur many times, slightly changed: a stress test of methods and measures.

    Real training sets are uneven like this: most images occur once, and some in many near-identical files.

    Args:
        images: Float in [0, 1], shape ``(n, C, H, W)``.
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
    if not 0 <= repeated <= len(images):
        raise ValueError(f"Argument `repeated` expected an integer from 0 to {len(images)}, but got {repeated}.")
    if repeats < 1:
        raise ValueError(f"Argument `repeats` expected an integer ≥ 1, but got {repeats}.")
    if change not in get_args(Change):
        raise ValueError(f"Argument `change` expected one of {get_args(Change)}, but got {change!r}.")
    source = torch.arange(repeated).repeat_interleave(repeats - 1)
    generator = torch.Generator().manual_seed(seed)
    others = _changed(images[source], change, generator)
    return torch.cat([images, others]), torch.cat([torch.arange(len(images)), source])


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


def first_of_groups(group: Tensor) -> Tensor:
    """Positions of the first member of each group, in ascending order: what is left when near-duplicates are dropped.

    Args:
        group: number of the group of each sample, shape ``(n,)``, from 0 without gaps.

    Example:
        >>> first_of_groups(torch.tensor([1, 0, 1, 2]))
        tensor([0, 1, 3])
    """
    first = torch.full((int(group.max()) + 1,), len(group)).scatter_reduce(0, group, torch.arange(len(group)), "amin")
    return first.sort().values
