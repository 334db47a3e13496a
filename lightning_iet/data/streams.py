"""Iterable data: every process and worker reads the whole stream and keeps the samples of its shards."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torch.utils.data._utils import worker

from lightning_iet.data.samples import fingerprint_of_samples
from lightning_iet.data.shard_sampler import ShardBatch
from lightning_iet.utilities.lightning import patched_attribute
from lightning_iet.utilities.random import get_rng_state, isolated_rng, set_rng_state


def split_stream(length: int, num_shards: int) -> list[Tensor]:
    """Return the positions of each shard's samples in a stream: sample i goes to shard i mod K.

    Example:
        >>> split_stream(5, 2)
        [tensor([0, 2, 4]), tensor([1, 3])]
    """
    return [torch.arange(shard, length, num_shards) for shard in range(num_shards)]


class StreamedSamples(Dataset[list[Any]]):
    """Reads a stream up to the samples of a batch, as if it had an index.

    A process reads the stream once for each shard that it hosts, and so does each of its workers. It reads all of it:
    ``get_worker_info()`` returns None meanwhile, since a stream that sees a worker yields only that worker's part.
    Every pass starts with the random generators at the same seed, so that sample i is the same sample on every process
    and in every epoch, and shards stay fixed; what is to be random in each epoch belongs into ``collate_fn`` or the
    module.

    Args:
        stream: An iterable data set.
        seed: Of each pass.

    Example:
        >>> class Squares(IterableDataset):
        ...     def __iter__(self):
        ...         return (i * i for i in range(10))
        >>> samples = StreamedSamples(Squares(), seed=0)
        >>> samples[ShardBatch(1, epoch=0, seed=0, indices=[1, 3])], samples[ShardBatch(1, 0, 0, [5, 7])]
        ([1, 9], [25, 49])
    """

    def __init__(self, stream: IterableDataset[Any], *, seed: int) -> None:
        self.stream = stream
        self.seed = seed
        self._passes: dict[int | None, _Pass] = {}

    def __getitem__(self, batch: ShardBatch) -> list[Any]:
        if not batch.indices:
            return []
        reading = self._passes.get(batch.shard)
        if reading is None or reading.position > batch.indices[0]:
            reading = self._passes[batch.shard] = _Pass(self.stream, self.seed)
        return reading.read(batch.indices)

    def __getstate__(self) -> dict[str, Any]:
        return {"stream": self.stream, "seed": self.seed, "_passes": {}}  # a started worker begins a pass of its own


class _Pass:
    """One pass over a stream, with random generators of its own."""

    def __init__(self, stream: IterableDataset[Any], seed: int) -> None:
        self.position = 0
        with isolated_rng(seed=seed), patched_attribute(worker, "_worker_info", None):
            self.samples = iter(stream)
            self.state = get_rng_state()

    def read(self, positions: Sequence[int]) -> list[Any]:
        """Return the samples at increasing positions that have not been passed yet."""
        with isolated_rng(), patched_attribute(worker, "_worker_info", None):
            set_rng_state(self.state)
            samples = [self._at(position) for position in positions]
            self.state = get_rng_state()
        return samples

    def _at(self, position: int) -> Any:
        for sample in self.samples:
            self.position += 1
            if self.position > position:
                return sample
        raise ValueError(
            f"Argument `num_samples` expected at most the length of the stream, but it ended after {self.position} "
            f"samples, before sample {position}. Give its length, or a smaller limit_train_batches."
        )


def fingerprint_of_stream(stream: IterableDataset[Any], *, length: int, seed: int, most: int = 32) -> str:
    """Return a hash of a stream's first samples.

    Raises:
        ValueError: If a second pass gives others: shards would then mix.
    """
    positions = range(min(length, most))
    first, again = (fingerprint_of_samples(_Pass(stream, seed).read(positions)) for _ in range(2))  # type: ignore[arg-type]
    if first != again:
        raise ValueError(
            f"Argument `datamodule` expected a stream that gives the same samples in every pass, but got "
            f"{type(stream).__name__}, which does not: shards would mix. Fix its order, and shuffle nothing in it."
        )
    return first
