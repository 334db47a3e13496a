"""Shards of any data module: who trains on which samples, in which order."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from lightning_iet.data.fingerprint import fingerprint_of_samples, fingerprint_of_shards
from lightning_iet.data.shard_sampler import SeededSamples, ShardPlan, ShardSampler
from lightning_iet.functional.sharding import Partition, partition

__all__ = ["ShardedDataModule", "labels_of"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Collate:
    """The user's way of making a batch from samples; no samples make no batch."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, samples: list[Any]) -> Any:
        return self.collate(samples) if samples else None


class _ResumableLoader(DataLoader[Any]):
    """Tells Lightning that it goes on where a run was cut; what it needs for that is in the sampler's plan."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class ShardedDataModule(pl.LightningDataModule):
    """Any data module, its training set split into shards that are trained one by one and averaged.

    Validation, test and prediction data, and everything else of the data module, are passed through. With one shard so
    is the training loader, untouched. To be used together with
    :class:`~lightning_iet.callbacks.ParameterAveragingCallback`.

    Args:
        datamodule: The data module; its ``train_dataloader()`` returns one map-style ``DataLoader``.
        num_shards: Number of shards, K.
        partition: ``"stratified"`` by the data set's labels (``targets`` or ``labels``) where it has any, iid
            otherwise; or ``"iid"``.
        seed: Seed of the split. Fixed for a run.

    Raises:
        ValueError: Before the first step, if there are more shards than samples (or than samples of a class).
        TypeError: If the training loader is not one map-style ``DataLoader`` with a random or sequential order.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> class Numbers(pl.LightningDataModule):
        ...     def train_dataloader(self):
        ...         return DataLoader(TensorDataset(torch.arange(6)), batch_size=2, shuffle=True)
        >>> loader = ShardedDataModule(Numbers(), num_shards=2).train_dataloader()
        >>> [len(numbers) for (numbers,) in loader]
        [2, 1, 2, 1]
    """

    def __init__(
        self, datamodule: pl.LightningDataModule, num_shards: int, *, partition: Partition = "stratified", seed: int = 0
    ) -> None:
        super().__init__()
        if partition not in ("stratified", "iid"):
            raise ValueError(f"Argument `partition` expected 'stratified' or 'iid', but got {partition!r}.")
        if num_shards < 1:
            raise ValueError(f"Argument `num_shards` expected an integer ≥ 1, but got {num_shards}.")
        self.datamodule = datamodule
        self.num_shards = num_shards
        self.partition = partition
        self.seed = seed
        self.prepare_data_per_node = datamodule.prepare_data_per_node
        self.plan: ShardPlan | None = None
        # Hooks of the inner module are called as if it stood here itself.
        for hook in _PASSED_HOOKS:
            setattr(self, hook, getattr(datamodule, hook))

    def __getattr__(self, name: str) -> Any:
        """What only the inner data module has, such as its data sets."""
        if name == "datamodule":  # not yet set: while unpickling
            raise AttributeError(name)
        return getattr(self.datamodule, name)

    def __setattr__(self, name: str, value: object) -> None:
        """Lightning attaches the trainer; the inner data module wants it too."""
        super().__setattr__(name, value)
        if name == "trainer" and "datamodule" in self.__dict__:
            self.datamodule.trainer = value  # type: ignore[assignment]

    def setup(self, stage: str) -> None:
        """Set up the inner data module."""
        self.datamodule.setup(stage)

    def train_dataloader(self) -> Any:
        """The inner loader with this process's shards in place of its order."""
        loader = self.datamodule.train_dataloader()
        if self.num_shards == 1:
            return loader
        if self.trainer is not None and self.plan is None:
            raise ValueError(
                f"ShardedDataModule with {self.num_shards} shards expected a ParameterAveragingCallback among the "
                f"trainer's callbacks, but got none. Add ParameterAveragingCallback(num_shards={self.num_shards})."
            )
        return self._shard(loader)

    def _shard(self, loader: object) -> DataLoader[Any]:
        """Rebuild a loader around a :class:`ShardSampler`, all its other settings kept."""
        shuffle, batch_size = _order_of(loader)
        loader = cast("DataLoader[Any]", loader)
        shards = self._partition(loader.dataset)
        sampler = ShardSampler(shards, batch_size, plan=self.plan, shuffle=shuffle, drop_last=loader.drop_last)
        sampler.identity = {
            "split": fingerprint_of_shards(shards),
            "training data": fingerprint_of_samples(loader.dataset),
        }
        kept = {name: getattr(loader, name) for name in _KEPT_LOADER_SETTINGS if hasattr(loader, name)}
        collate = _Collate(loader.collate_fn)
        samples = SeededSamples(loader.dataset)
        return _ResumableLoader(samples, sampler=sampler, batch_size=None, collate_fn=collate, **kept)

    def _partition(self, dataset: Dataset[Any]) -> list[Tensor]:
        size = len(dataset)  # type: ignore[arg-type]
        if size == 0:
            raise ValueError("Argument `datamodule` expected a training set with samples, but got an empty one.")
        labels = labels_of(dataset) if self.partition == "stratified" else None
        how = "iid" if labels is None else f"stratified by {len(labels.unique())} classes"
        shards = partition(size, self.num_shards, labels=labels, seed=self.seed)
        sizes = {len(shard) for shard in shards}
        log.info("Shards: %d samples in %d shards of %s, %s.", size, self.num_shards, sorted(sizes), how)
        return shards


_KEPT_LOADER_SETTINGS = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)
_PASSED_HOOKS = (
    "prepare_data",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "teardown",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "state_dict",
    "load_state_dict",
    "on_exception",
)


def _order_of(loader: object) -> tuple[bool, int]:
    """Whether a loader shuffles, and its batch size; refuses what cannot be split into shards."""
    remedy = "Return one DataLoader(dataset, batch_size=…, shuffle=True) over a map-style data set."
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = "an iterable data set" if isinstance(loader, DataLoader) else type(loader).__name__
        raise TypeError(f"Argument `datamodule` expected one map-style training DataLoader, but got {kind}. {remedy}")
    order = loader.sampler
    if loader.batch_size is None or not isinstance(order, RandomSampler | SequentialSampler):
        kind = type(order if loader.batch_size else loader.batch_sampler).__name__
        raise TypeError(f"Argument `datamodule` expected a loader in random or stored order, but got {kind}. {remedy}")
    return isinstance(order, RandomSampler), loader.batch_size


def _are_words(labels: object) -> bool:
    return isinstance(labels, list | tuple) and bool(labels) and isinstance(labels[0], str)


def labels_of(dataset: Dataset[Any]) -> Tensor | None:
    """Class labels of a data set, shape ``(n,)``, or None.

    Looks for ``targets`` or ``labels``, through subsets and concatenations.

    Example:
        >>> labels_of(Subset([1, 2, 3], [0])) is None
        True
    """
    if isinstance(dataset, Subset):
        inner = labels_of(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_of(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat(cast("list[Tensor]", parts))
    for name in ("targets", "labels"):
        labels = getattr(dataset, name, None)
        if labels is not None:
            labels = torch.as_tensor(np.unique(labels, return_inverse=True)[1] if _are_words(labels) else labels)
            if labels.ndim == 1 and not labels.is_floating_point():
                return labels
    return None
