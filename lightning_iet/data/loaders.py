"""What a training loader does, so that it can be done by shards."""

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
class Patient:
    """A ``worker_init_fn`` after which a worker does not end at the first SIGTERM.

    Batch systems send that signal to all processes of a job. The main ones finish their step, for which they may need a
    batch that is not read yet. Workers end with their loader, or at a second signal.

    Args:
        init: The user's own ``worker_init_fn``, called as well.
    """

    init: Callable[[int], None] | None = None

    def __call__(self, worker: int) -> None:
        """Prepare a worker."""
        signal.signal(signal.SIGTERM, _wait_once)
        if self.init is not None:
            self.init(worker)


def _wait_once(number: int, frame: FrameType | None) -> None:
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
class Order:
    """In which order a loader reads its samples, and how many at a time."""

    batch_size: int = 1
    drop_last: bool = False
    shuffle: bool | None = None
    """Random order or stored order; ``None`` = the sampler's."""
    sampler: Any = None
    batch_sampler: Any = None
    """Somebody's own, which makes batches in its own way."""


def read_order(loader: object) -> Order:
    """Look at a loader; refuses what cannot be split into shards.

    Raises:
        TypeError: If it is not one ``DataLoader``, or one that makes its batches itself.

    Example:
        >>> read_order(DataLoader([1, 2, 3], batch_size=2, shuffle=True)).shuffle
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
        return _order_of(loader.sampler, 1, drop_last=True)
    if isinstance(loader.dataset, IterableDataset) or type(batches) is BatchSampler:
        # The loader's own, or one that somebody has made of a sampler in the same way.
        return _order_of(batches.sampler, batches.batch_size, drop_last=batches.drop_last)  # type: ignore[attr-defined]
    return Order(batch_sampler=batches)


def _order_of(sampler: Any, batch_size: int, *, drop_last: bool) -> Order:
    kind = type(sampler)
    shuffle = None
    if kind is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        shuffle = True
    elif kind is SequentialSampler:
        shuffle = False
    elif kind is DistributedSampler:  # shards are what it is for
        shuffle = sampler.shuffle
    return Order(batch_size, drop_last, shuffle, sampler)


class _ResumableLoader(DataLoader[Any]):
    """Tells Lightning that it goes on where a run was cut; what it needs for that is in the sampler's plan."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class _Samples(list[Any]):
    """The samples of a batch, and the seed with which they are made one."""

    seed = 0


@dataclass(frozen=True)
class _Seeded(Dataset[_Samples]):
    """Adds the seed to the samples of a batch."""

    samples: Dataset[list[Any]]

    def __getitem__(self, batch: ShardBatch) -> _Samples:
        samples = _Samples(self.samples[batch])
        if batch.indices:
            samples.seed = derive_seed(batch.seed, batch.epoch, batch.indices[0], len(batch.indices))
        return samples


@dataclass(frozen=True)
class _Collate:
    """The user's way of making a batch from samples; no samples make no batch.

    What it draws (captions that are dropped, say) depends on the batch alone, as what the data set draws does.
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
    """A loader of a sampler's batches, all other settings kept.

    Args:
        loader: The user's.
        samples: Reads the samples of a :class:`~lightning_iet.data.ShardBatch`.
        sampler: Orders them.
    """
    kept = {name: getattr(loader, name) for name in _KEPT if hasattr(loader, name)}
    kept["worker_init_fn"] = Patient(loader.worker_init_fn)
    collate = _Collate(loader.collate_fn, batched=loader.batch_sampler is not None)
    return _ResumableLoader(_Seeded(samples), sampler=sampler, batch_size=None, collate_fn=collate, **kept)
