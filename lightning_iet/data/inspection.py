"""Reading every image once before training, so that what cannot be used is found at the start."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_iet.data.decoding import Depth, Preparation, Size
from lightning_iet.data.formats import Range
from lightning_iet.data.samples import Skip, image_and_condition, labels_of, listed, name_of, reason_of
from lightning_iet.data.splits import deal

log = logging.getLogger(__name__)

BATCH = 64
FEW = 1024  # images up to which starting processes takes longer than reading


class Deep(NamedTuple):
    """How many images of more than 8 bits there are of a depth, and their least and largest stored value."""

    depth: Depth
    images: int
    values: Range


@dataclass(frozen=True, eq=False)
class CheckedSource:
    """A source, and which of its samples can be used.

    Attributes:
        source: The map-style data set.
        indices: Its samples that can be used, shape ``(m,)``.
        labels: Class of every sample of the source, usable or not; ``None`` = it has none.
        skipped: The others.
        sizes: Of each size of image that was met, one name.
        deep: Images of more than 8 bits that were met.
    """

    source: Dataset[Any]
    indices: Tensor
    labels: Tensor | None = None
    skipped: Sequence[Skip] = ()
    sizes: Mapping[Size, str] = field(default_factory=dict)
    deep: Sequence["Deep"] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, sizes: Sequence[int], *, seed: int) -> list[Tensor]:
        """Select disjoint sets at random, each with the classes in the shares that they have of all.

        Args:
            sizes: Of the sets, together at most the number of usable samples.
            seed: Of the selection.

        Returns:
            Positions in the source, ascending: one tensor per set.
        """
        labels = torch.zeros(len(self), dtype=torch.long) if self.labels is None else self.labels[self.indices]
        order = deal(labels, seed=seed, proportional=True)[: sum(sizes)]
        return [self.indices[part.sort().values] for part in order.split(list(sizes))]


def check_source(
    source: Dataset[Any],
    prepare: Callable[[Any], Tensor],
    *,
    where: str,
    skip: bool = False,
    read: bool = True,
    num_classes: int | None = None,
) -> CheckedSource:
    """Check the images and labels of a source.

    Args:
        source: Map-style; samples that it knows to be unusable, and leaves out, may be named as ``source.skipped``.
        prepare: Makes a tensor of an image.
        where: It lies, for messages.
        skip: Whether what cannot be used is left out, instead of ending the run.
        read: Whether to read every image.
        num_classes: Labels are below it.

    Raises:
        TypeError: If it is not map-style.
        ValueError: If some images cannot be used, or none, or labels are out of range.
    """
    if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        raise TypeError(
            f"Method `load` expected to return a map-style data set, or a tuple of two, but got "
            f"{type(source).__name__}. Give it `__getitem__` and `__len__`."
        )
    labels = labels_of(source)
    indices, skipped, sizes = torch.arange(len(source)), list(getattr(source, "skipped", ())), dict[Size, str]()
    deep: list[Deep] = []
    total = len(source) + len(skipped)
    if read:
        indices, unreadable, sizes, deep = inspect(source, prepare)
        skipped += unreadable
    if skipped and (not skip or not len(indices)):
        raise ValueError(
            f"Argument `root` expected images that can all be used, but got {where} with {len(skipped)} of {total} "
            f"that cannot: {listed(skipped)}. Mend or remove them, or leave them out with `on_error: skip`."
        )
    if not len(indices):
        raise ValueError(f"Argument `root` expected images, but got {where}, which holds none. Check the path.")
    if skipped:
        log.warning("Left out %d of %d images of %s: %s.", len(skipped), total, where, listed(skipped))
    if labels is not None:
        check_labels(source, labels, num_classes)
    return CheckedSource(source, indices, labels, skipped, sizes, deep)


class _Finding(NamedTuple):
    position: int
    size: Size
    reason: str | None
    depth: Depth = "8 bits"
    values: Range = (0, 0)


def inspect(
    source: Dataset[Any], prepare: Callable[[Any], Tensor], *, workers: int | None = None
) -> tuple[Tensor, list[Skip], dict[Size, str], list[Deep]]:
    """Read and prepare every image of a source.

    Args:
        source: Map-style, see :class:`~lightning_iet.data.samples.Samples`.
        prepare: Makes a tensor of an image.
        workers: Processes; ``None`` = one for each core, or none at all for few images.

    Returns:
        The samples that can be used, shape ``(m,)``; the others; of each size the first image's name; and what there
        is of more than 8 bits, if ``prepare`` is a :class:`~lightning_iet.data.decoding.Preparation`.

    Example:
        >>> source = [torch.zeros(1, 4, 4), torch.full((1, 4, 4), 2.0)]
        >>> usable, skipped, sizes, _ = inspect(source, torch.Tensor.float)
        >>> usable, skipped[0].reason, sizes
        (tensor([0]), 'values from 2 to 2, not in [0, 1]', {(4, 4): '0'})
    """
    found = _Findings(source, prepare)
    loader = DataLoader(found, BATCH, num_workers=_workers(len(found)) if workers is None else workers, collate_fn=list)
    usable, skipped, sizes = list[int](), list[Skip](), dict[Size, str]()
    deep: dict[Depth, Deep] = {}
    for finding in (finding for batch in loader for finding in batch):
        if finding.reason is None:
            usable.append(finding.position)
            if finding.size not in sizes:
                sizes[finding.size] = name_of(source, finding.position)
            if finding.depth != "8 bits":
                _, images, (low, high) = deep.get(finding.depth, Deep(finding.depth, 0, finding.values))
                values = min(low, finding.values[0]), max(high, finding.values[1])
                deep[finding.depth] = Deep(finding.depth, images + 1, values)
        else:
            skipped.append(Skip(name_of(source, finding.position), finding.reason))
    return torch.tensor(usable, dtype=torch.long), skipped, sizes, list(deep.values())


class _Findings(Dataset[_Finding]):
    def __init__(self, source: Dataset[Any], prepare: Callable[[Any], Tensor]) -> None:
        self.source, self.prepare = source, prepare

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> _Finding:
        try:
            stored = image_and_condition(self.source[index])[0]
            depth: Depth = "8 bits"
            values: Range = (0, 0)
            if isinstance(self.prepare, Preparation):
                image, depth, values = self.prepare.measured(stored)
            else:
                image = self.prepare(stored)
            low, high = (value.item() for value in image.aminmax())
            if not (low >= 0 and high <= 1):  # written so that NaN, which compares false, is refused as well
                raise ValueError(f"values from {low:.4g} to {high:.4g}, not in [0, 1]")
        except Exception as error:  # decoders raise whatever damaged bytes provoke
            return _Finding(index, (0, 0), reason_of(error))
        return _Finding(index, (image.shape[-2], image.shape[-1]), None, depth, values)


def _workers(images: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if images > FEW else 0


def check_sizes(sizes: Mapping[Size, str]) -> None:
    """Refuse images of several sizes.

    Args:
        sizes: Of each size an image's name.

    Raises:
        ValueError: Naming two of them.
    """
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise ValueError(
            f"Argument `image_size` expected the size to bring all images to, since '{first}' has {one[1]}x{one[0]} "
            f"pixels and '{second}' has {other[1]}x{other[0]}, but got None."
        )


def check_labels(source: Dataset[Any], labels: Tensor, num_classes: int | None) -> None:
    """Refuse labels outside of ``0 … num_classes - 1``.

    Args:
        source: Map-style.
        labels: Of its samples, shape ``(n,)``.
        num_classes: Number of classes; ``None`` = any.

    Raises:
        ValueError: Naming the first sample.
    """
    wrong = (labels < 0) if num_classes is None else (labels < 0) | (labels >= num_classes)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        wanted = "labels from 0" if num_classes is None else f"labels 0 … {num_classes - 1}"
        raise ValueError(
            f"Argument `num_classes` expected {wanted}, but got {int(labels[index])} for '{name_of(source, index)}' "
            f"({int(wrong.sum())} of {len(labels)} are out of range). Number the classes from 0, or correct the number."
        )
