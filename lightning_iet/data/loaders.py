"""Reading the settings of a training loader, and rebuilding it around a sampler of shards."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_iet.data.shard_sampler import ShardBatch, ShardSampler
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.random import isolated_rng, seed_rng


@dataclass(frozen=True)
class IgnoreFirstSigterm:
    """A ``worker_init_fn`` after which a worker ends at the second SIGTERM, not at the first.

    Batch systems send that signal to all processes of a job. The main ones finish their step, for which they may need a
    batch that is not read yet. Workers end with their loader, or at a second signal.

    Args:
        init: The user's own ``worker_init_fn``, called as well.
    """

    init: Callable[[int], None] | None = None

    def __call__(self, worker: int) -> None:
        """Prepare a worker."""
        signal.signal(signal.SIGTERM, _end_at_the_next)
        if self.init is not None:
            self.init(worker)


def _end_at_the_next(number: int, frame: FrameType | None) -> None:
    signal.signal(number, lambda *_: os._exit(128 + number))


_KEPT = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


@dataclass(frozen=True)
class Batching:
    """How a loader makes batches: from which sampler, and of how many samples."""

    batch_size: int = 1
    drop_last: bool = False
    shuffle: bool | None = None
    """Random order or stored order; ``None`` = the sampler's."""
    sampler: Any = None
    batch_sampler: Any = None
    """A batch sampler of another class than PyTorch's."""


def read_batching(loader: object) -> Batching:
    """Return how a loader makes batches.

    Raises:
        TypeError: If it is not one ``DataLoader``, or one that makes its batches itself: neither can be split.

    Example:
        >>> read_batching(DataLoader([1, 2, 3], batch_size=2, shuffle=True)).shuffle
        True
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"Argument `datamodule` expected one training DataLoader, but got {type(loader).__name__}. "
            "Return one DataLoader; join data sets with torch.utils.data.ConcatDataset."
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise TypeError(
            f"Argument `datamodule` expected torch's DataLoader, but got {type(loader).__name__}, which makes its "
            "batches itself. Return torch.utils.data.DataLoader(dataset, …)."
        )
    batches = loader.batch_sampler
    if batches is None:  # no batching by the loader; with drop_last, for all shards then take equally many
        return _batching_of(loader.sampler, 1, drop_last=True)
    if isinstance(loader.dataset, IterableDataset) or type(batches) is BatchSampler:
        # The loader's own, or one of the same class made by hand.
        return _batching_of(batches.sampler, batches.batch_size, drop_last=batches.drop_last)  # type: ignore[attr-defined]
    return Batching(batch_sampler=batches)


def _batching_of(sampler: Any, batch_size: int, *, drop_last: bool) -> Batching:
    kind = type(sampler)
    shuffle = None
    if kind is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        shuffle = True
    elif kind is SequentialSampler:
        shuffle = False
    elif kind is DistributedSampler:  # which the shards replace
        shuffle = sampler.shuffle
    return Batching(batch_size, drop_last, shuffle, sampler)


class _ResumableLoader(DataLoader[Any]):
    """Has the methods by which Lightning knows that a loader can resume; the sampler's plan holds the position."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing."""


class _Samples(list[Any]):
    """The samples of a batch, and the seed of their collate function."""

    seed = 0


@dataclass(frozen=True)
class Seeded(Dataset[_Samples]):
    """Adds that seed to the samples of a batch, which shards read; it has no length."""

    samples: Dataset[list[Any]]

    def __getitem__(self, batch: ShardBatch) -> _Samples:
        samples = _Samples(self.samples[batch])
        if batch.indices:
            samples.seed = derive_seed(batch.seed, batch.epoch, batch.indices[0], len(batch.indices))
        return samples


@dataclass(frozen=True)
class _Collate:
    """The user's collate function, seeded by the batch, so that its random choices depend on that alone.

    No samples make no batch.
    """

    collate: Callable[[Any], Any]
    batched: bool = True

    def __call__(self, samples: list[Any]) -> Any:
        if not samples:
            return None
        with isolated_rng():
            seed_rng(cast("_Samples", samples).seed, devices=False)
            return self.collate(samples if self.batched else samples[0])


def rebuild(loader: DataLoader[Any], samples: Dataset[list[Any]], sampler: ShardSampler) -> DataLoader[Any]:
    """Return a loader of a sampler's batches, with all other settings of the user's.

    Args:
        loader: The user's.
        samples: Reads the samples of a :class:`~lightning_iet.data.ShardBatch`.
        sampler: Orders them.
    """
    kept = {name: getattr(loader, name) for name in _KEPT if hasattr(loader, name)}
    kept["worker_init_fn"] = IgnoreFirstSigterm(loader.worker_init_fn)
    collate = _Collate(loader.collate_fn, batched=loader.batch_sampler is not None)
    return _ResumableLoader(Seeded(samples), sampler=sampler, batch_size=None, collate_fn=collate, **kept)
