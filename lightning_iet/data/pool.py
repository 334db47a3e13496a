"""A source of images with all that has to be known of it before it is split."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iet.data.decoding import Size
from lightning_iet.data.indexed_images import IndexedImages
from lightning_iet.data.inspection import check_labels, inspect
from lightning_iet.data.labels import labels_of
from lightning_iet.data.preparation import Preparation
from lightning_iet.data.skips import Skip, listed
from lightning_iet.data.splits import deal
from lightning_iet.data.synthetic import SyntheticImages

__all__ = ["Pool"]

log = logging.getLogger(__name__)

_IN_MEMORY = (IndexedImages, SyntheticImages)


@dataclass(frozen=True, eq=False)
class Pool:
    """What sets of samples are drawn from.

    Attributes:
        source: The map-style data set.
        indices: Its samples that can be used, shape ``(m,)``.
        labels: Class of every sample of the source, usable or not; ``None`` = it has none.
        skipped: The others.
        sizes: Of each size of image that was met, one name.
    """

    source: Dataset[Any]
    indices: Tensor
    labels: Tensor | None = None
    skipped: Sequence[Skip] = ()
    sizes: Mapping[Size, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def of(
        cls,
        source: Dataset[Any],
        prepare: Preparation,
        *,
        where: str,
        skip: bool = False,
        check: bool = True,
        num_classes: int | None = None,
    ) -> Self:
        """Look at a source.

        Args:
            source: Map-style; samples that it knows to be unusable, and leaves out, may be named as ``source.skipped``.
            prepare: Makes a tensor of an image.
            where: It lies, for messages.
            skip: Whether what cannot be used is left out, instead of ending the run.
            check: Whether to try every image, unless it is in memory.
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
        total = len(source)
        indices, skipped, sizes = torch.arange(total), list(getattr(source, "skipped", ())), dict[Size, str]()
        total += len(skipped)
        if check and not isinstance(source, _IN_MEMORY):
            indices, more, sizes = inspect(source, prepare)
            skipped += more
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
        return cls(source, indices, labels, skipped, sizes)

    def draw(self, sizes: Sequence[int], *, seed: int) -> list[Tensor]:
        """Draw disjoint sets, each with the classes in the shares that they have of all.

        Args:
            sizes: Of the sets, together at most the number of usable samples.
            seed: Of the draw.

        Returns:
            Positions in the source, ascending: one tensor per set.
        """
        labels = torch.zeros(len(self), dtype=torch.long) if self.labels is None else self.labels[self.indices]
        order = deal(labels, seed=seed, proportional=True)[: sum(sizes)]
        return [self.indices[part.sort().values] for part in order.split(list(sizes))]
