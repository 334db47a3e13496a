"""Samples that are drawn more or less often than others, by a table that changes from epoch to epoch."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iet.data.samples import Layer


class DrawTable:
    """Which sample is read in the place of each one in an epoch; read by the workers of a loader.

    It lies in shared memory. The main process writes it between epochs only, when no worker reads.

    Attributes:
        sample: Shape ``(n,)``, int64; empty until a data set is known, and then each sample itself.
    """

    def __init__(self) -> None:
        self.sample = torch.zeros(0, dtype=torch.long)

    def allocate(self, num_samples: int) -> None:
        """Make room for the samples of a data set; a table of that size stays as it is."""
        if len(self.sample) != num_samples:
            self.sample = torch.arange(num_samples).share_memory_()

    def write(self, sample: Tensor) -> None:
        """Say what is read in an epoch; shape ``(n,)``."""
        self.sample.copy_(sample)

    def clear(self) -> None:
        """Let each sample be read in its own place."""
        torch.arange(len(self.sample), out=self.sample)


class DrawnByWeight(Layer):
    """A data set from which :class:`~lightning_iet.AntiGradientControl` draws samples by weight (``weigh="draws"``).

    Without it, each sample is drawn once an epoch. With it, an epoch has as many draws as before, in which samples that
    the model knows better than others come up less often, and the others more often. The sampler deals out places, and
    the table says which sample is read in the place of another, under shards always one of the same shard. So it should
    deal out each place once an epoch: one that favours some samples, or puts those of one size into a batch, does so
    for places, not for what is read there.

    Make it the outermost wrapper, around :class:`~lightning_iet.data.WithIndex`, and keep it where it can be found
    before training: as an attribute of the data module, or in the loader that is given to ``fit``. Data modules of this
    package need nothing.

    Args:
        dataset: Map-style; its samples carry their index.
        table: What the callback writes; ``None`` = its own.

    Example:
        >>> from lightning_iet.data import WithIndex
        >>> drawn = DrawnByWeight(WithIndex(["a", "b", "c"]))
        >>> drawn.table.write(torch.tensor([0, 0, 2]))
        >>> [drawn[place] for place in range(len(drawn))]
        [('a', 0), ('a', 0), ('c', 2)]
    """

    def __init__(self, dataset: Dataset[Any], table: DrawTable | None = None) -> None:
        super().__init__(dataset)
        self.table = DrawTable() if table is None else table
        self.table.allocate(len(dataset))  # type: ignore[arg-type]
        self.is_paused = False

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index if self.is_paused else int(self.table.sample[index])]
