"""Looks at every image once before training: what cannot be used is found now, not after hours."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_iet.data.decoding import Size
from lightning_iet.data.samples import Skip, image_and_condition, name_of, reason_of

BATCH = 64
FEW = 1024  # images up to which starting processes takes longer than reading


class _Finding(NamedTuple):
    position: int
    size: Size
    reason: str | None


def inspect(
    source: Dataset[Any], prepare: Callable[[Any], Tensor], *, workers: int | None = None
) -> tuple[Tensor, list[Skip], dict[Size, str]]:
    """Prepare every image of a source, and forget it.

    Args:
        source: Map-style, see :class:`~lightning_iet.data.samples.Samples`.
        prepare: Makes a tensor of an image.
        workers: Processes; ``None`` = one for each core, or none at all for few images.

    Returns:
        The samples that can be used, shape ``(m,)``; the others; and of each size the first image's name.

    Example:
        >>> source = [torch.zeros(1, 4, 4), torch.full((1, 4, 4), 2.0)]
        >>> usable, skipped, sizes = inspect(source, torch.Tensor.float)
        >>> usable, skipped[0].reason, sizes
        (tensor([0]), 'values from 2 to 2, not in [0, 1]', {(4, 4): '0'})
    """
    found = _Findings(source, prepare)
    loader = DataLoader(found, BATCH, num_workers=_workers(len(found)) if workers is None else workers, collate_fn=list)
    usable, skipped, sizes = list[int](), list[Skip](), dict[Size, str]()
    for finding in (finding for batch in loader for finding in batch):
        if finding.reason is None:
            usable.append(finding.position)
            if finding.size not in sizes:
                sizes[finding.size] = name_of(source, finding.position)
        else:
            skipped.append(Skip(name_of(source, finding.position), finding.reason))
    return torch.tensor(usable, dtype=torch.long), skipped, sizes


class _Findings(Dataset[_Finding]):
    def __init__(self, source: Dataset[Any], prepare: Callable[[Any], Tensor]) -> None:
        self.source, self.prepare = source, prepare

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> _Finding:
        try:
            image = self.prepare(image_and_condition(self.source[index])[0])
            _check_range(image)
        except Exception as error:  # decoders raise whatever damaged bytes provoke
            return _Finding(index, (0, 0), reason_of(error))
        return _Finding(index, (image.shape[-2], image.shape[-1]), None)


def _workers(images: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if images > FEW else 0


def _check_range(image: Tensor) -> None:
    low, high = (value.item() for value in image.aminmax())
    if not (low >= 0 and high <= 1):  # written so that NaN, which compares false, is refused as well
        raise ValueError(f"values from {low:.4g} to {high:.4g}, not in [0, 1]")


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
