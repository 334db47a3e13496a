"""Images that a user has stored somewhere, each with a label or a caption or neither."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iet.data.images import ImageDataModule
from lightning_iet.data.skips import Skip
from lightning_iet.data.sources import Data, Source

__all__ = ["StoredDataModule", "StoredSamples"]


class StoredSamples(Dataset[tuple[Data, Any]]):
    """Images of a source with their conditions; yields ``(image as it is stored, condition)``.

    Args:
        source: Where images are read.
        conditions: By position in the source: classes, or captions; ``None`` for an image that has neither, which is
            left out. No list at all = no image has any.
        missing: Why an image without one cannot be used.

    Attributes:
        targets: Classes; only where conditions are.
        skipped: Images that were left out.

    Example:
        >>> from lightning_iet.data.sources import ArraySource
        >>> import numpy as np
        >>> stored = StoredSamples(ArraySource(np.zeros((3, 8, 8), np.uint8)), [7, None, 9], missing="no label")
        >>> len(stored), stored[1][1], stored.targets, stored.skipped
        (2, 9, tensor([7, 9]), [Skip(name='1', reason='no label')])
    """

    targets: Tensor

    def __init__(
        self,
        source: Source,
        conditions: Sequence[int | str | None] | None = None,
        *,
        missing: str = "no condition",
    ) -> None:
        self.source = source
        found: Sequence[int | str | None] = [0] * len(source) if conditions is None else conditions
        self.positions = [position for position, condition in enumerate(found) if condition is not None]
        self.conditions = [condition for condition in found if condition is not None]
        self.skipped = [Skip(source.name(position), missing) for position, c in enumerate(found) if c is None]
        if conditions is not None and self.conditions and isinstance(self.conditions[0], int):
            self.targets = torch.tensor(self.conditions)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Data, Any]:
        return self.source.read(self.positions[index]), self.conditions[index]

    def name(self, index: int) -> str:
        """What to call a sample."""
        return self.source.name(self.positions[index])


class StoredDataModule(ImageDataModule):
    """Base of data modules for what a user has stored; a subclass opens it.

    Args:
        root: Where it is.
        held_out: Where held-out images are, stored in the same way; ``None`` = hold out some of those in ``root``.
        **kwargs: See :class:`~lightning_iet.data.ImageDataModule`.
    """

    expected: ClassVar[str] = "a folder of images"

    def __init__(self, root: Path | None = None, *, held_out: Path | None = None, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.held_out = None if held_out is None else Path(held_out)

    def load(self) -> Dataset[Any] | tuple[Dataset[Any], Dataset[Any]]:
        """Open what is stored."""
        if self.root is not None and self.held_out is not None and self.held_out.exists():
            inner, outer = sorted((self.held_out.resolve(), self.root.resolve()), key=lambda path: -len(path.parts))
            if inner.is_relative_to(outer):
                raise ValueError(
                    f"Argument `held_out` expected a place beside `root`, but got '{self.held_out}' and '{self.root}', "
                    "one in the other: the model would be trained on images that are to be held out."
                )
        train = self._checked("root", self.root)
        return train if self.held_out is None else (train, self._checked("held_out", self.held_out))

    def _checked(self, argument: str, path: Path | None) -> Dataset[Any]:
        if path is None or not path.exists():
            raise FileNotFoundError(self._absent(argument, path))
        return self.open(path, argument=argument)

    def _absent(self, argument: str, path: Path | None) -> str:
        return (
            f"Argument `{argument}` expected {self.expected}, but got {'None' if path is None else f'{str(path)!r}'}"
            f"{'' if path is None else ', which does not exist'}. Give the right path, or try with random images by "
            "`synthetic: true`."
        )

    def open(self, path: Path, *, argument: str) -> Dataset[Any]:
        """What is stored at a path that exists.

        Args:
            path: Where it is.
            argument: Under which name the user gave it: ``"root"`` is opened first, then ``"held_out"``.
        """
        raise NotImplementedError
