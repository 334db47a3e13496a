"""Samples as training wants them: ``(image, condition, index)``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iet.data.skips import name_of, reason_of

__all__ = ["RandomFlips", "Samples", "image_and_condition"]


def image_and_condition(sample: Any) -> tuple[Any, Any]:
    """The first two entries of a sample; an image alone has the condition 0.

    Example:
        >>> image_and_condition(("image", "a caption", 7)), image_and_condition("image")
        (('image', 'a caption'), ('image', 0))
    """
    if not isinstance(sample, tuple | list):
        return sample, 0
    return sample[0], sample[1] if len(sample) > 1 else 0


class Samples(Dataset[tuple[Tensor, Any, int]]):
    """Some of a source's samples; yields ``(image, condition, index)`` with the position among them as index.

    Args:
        source: A map-style data set whose samples are images, or tuples that begin with image and condition.
        indices: Which of its samples, shape ``(n,)``.
        prepare: Makes a tensor of an image.
        labels: Class of every sample of the source, which is then its condition; ``None`` = the source's own.

    Raises:
        ValueError: When a sample is read whose image is damaged, naming it.

    Attributes:
        targets: Classes of these samples, by which shards are stratified; only with ``labels``.

    Example:
        >>> samples = Samples(["a", "b", "c"], torch.tensor([2, 0]), str.upper, labels=torch.tensor([7, 8, 9]))
        >>> samples[0], samples.targets
        (('C', 9, 0), tensor([9, 7]))
    """

    targets: Tensor

    def __init__(
        self, source: Dataset[Any], indices: Tensor, prepare: Callable[[Any], Any], *, labels: Tensor | None = None
    ) -> None:
        self.source = source
        self.indices = indices
        self.prepare = prepare
        self.labelled = labels is not None
        if labels is not None:
            self.targets = labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Any, int]:
        position = int(self.indices[index])
        try:
            image, condition = image_and_condition(self.source[position])
            image = self.prepare(image)
        except Exception as error:  # decoders raise whatever damaged bytes provoke
            raise ValueError(
                f"Image '{name_of(self.source, position)}' cannot be read ({reason_of(error)}). With `check: true`, "
                "all such images are found before training."
            ) from error
        return image, int(self.targets[index]) if self.labelled else condition, index


class RandomFlips(Dataset[tuple[Tensor, Any, int]]):
    """Samples whose images are mirrored left to right with probability 1/2.

    It draws from torch's global generator: under shards that is seeded for each sample and epoch, so that a resumed
    run, or one on other processes, sees the same flips.

    Args:
        samples: Yields tuples that begin with an image.

    Example:
        >>> flips = RandomFlips([(torch.tensor([[[1, 2]]]), "a caption", 0)])
        >>> sorted({tuple(flips[0][0].flatten().tolist()) for _ in range(99)})
        [(1, 2), (2, 1)]
    """

    def __init__(self, samples: Dataset[Any]) -> None:
        self.samples = samples

    def __getattr__(self, name: str) -> Any:
        if name == "samples":  # not yet set: while unpickling
            raise AttributeError(name)
        return getattr(self.samples, name)

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Any, int]:
        image, *rest = self.samples[index]
        return (image.flip(-1) if torch.rand(()) < 0.5 else image, *rest)
