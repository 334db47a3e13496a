"""Any data module, with its training set split into shards; its loader is rebuilt around their sampler."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_iet.data.augmentation import Kind, find_layer, unaugmented
from lightning_iet.data.samples import IgnoreFirstSigterm, fingerprint_of_samples, fingerprint_of_shards, labels_of
from lightning_iet.data.shard_sampler import (
    RestrictedBatchSampler,
    RestrictedOrder,
    RestrictedSampler,
    SeededOrder,
    SeededSamples,
    ShardBatch,
    ShardPlan,
    ShardSampler,
    StreamedSamples,
    fingerprint_of_stream,
    split_stream,
    uses_its_sampler,
)
from lightning_iet.functional.checks import check_at_least, check_kinds
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.functional.sharding import Partition, num_replicas, partition
from lightning_iet.utilities.lightning import lightning_classes
from lightning_iet.utilities.random import isolated_rng, seed_rng

log = logging.getLogger(__name__)


# --- the training loader: its settings, and a loader around a sampler of shards ---------------------------------------

_KEPT = (
    "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor",
    "persistent_workers", "in_order",
)  # fmt: skip


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
    """Return a loader of a sampler's batches, read by ``samples``, with all other settings of the user's."""
    kept = {name: getattr(loader, name) for name in _KEPT if hasattr(loader, name)}
    kept["worker_init_fn"] = IgnoreFirstSigterm(loader.worker_init_fn)
    collate = _Collate(loader.collate_fn, batched=loader.batch_sampler is not None)
    return _ResumableLoader(Seeded(samples), sampler=sampler, batch_size=None, collate_fn=collate, **kept)


# --- the data module --------------------------------------------------------------------------------------------------

if TYPE_CHECKING:

    class DataModule(pl.LightningDataModule):
        """A data module for ``import lightning`` and ``import pytorch_lightning``."""

else:
    DataModule = type(
        "DataModule", lightning_classes("LightningDataModule"), {"__doc__": "A data module for both Lightnings."}
    )


_PASSED_HOOKS = (
    "prepare_data", "val_dataloader", "test_dataloader", "predict_dataloader", "teardown", "on_before_batch_transfer",
    "transfer_batch_to_device", "on_after_batch_transfer", "state_dict", "load_state_dict", "on_exception",
)  # fmt: skip


class ShardedDataModule(DataModule):
    """Wraps any data module and splits its training set into shards, each for a shard model of its own.

    Validation, test and prediction data, and everything else of the data module, are passed through; with one shard the
    training loader too. To be used together with
    :class:`~lightning_iet.callbacks.ParameterAveragingCallback`.

    The training loader may have any sampler or batch sampler: each shard takes its own samples in that order. Of
    iterable data, sample i goes to shard i mod K; every process reads the stream once for each of its shards.

    Args:
        datamodule: The data module; its ``train_dataloader()`` returns one ``DataLoader``. For loaders without a data
            module, see :meth:`from_loader`.
        num_shards: Number of shards, K.
        partition: ``"stratified"`` by the data set's labels (``targets`` or ``labels``) where it has any, iid
            otherwise; or ``"iid"``.
        seed: Seed of the split, and of a stream's order. Fixed for a run.
        num_samples: Length of iterable data that do not tell it.

    Raises:
        ValueError: Before the first step, if there are more shards than samples (or than samples of a class), or a
            stream's length is not known or its order not fixed.
        TypeError: If ``datamodule`` is no data module, or a number no integer; if the training loader is not one
            ``DataLoader``, or its sampler cannot be restricted to shards.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> train = DataLoader(TensorDataset(torch.arange(6)), batch_size=2, shuffle=True)
        >>> loader = ShardedDataModule.from_loader(train, num_shards=2).train_dataloader()
        >>> [len(numbers) for (numbers,) in loader]
        [2, 1, 2, 1]
    """

    def __init__(
        self,
        datamodule: pl.LightningDataModule,
        num_shards: int,
        *,
        partition: Partition = "stratified",
        seed: int = 0,
        num_samples: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(datamodule, DataLoader):
            raise TypeError(
                "Argument `datamodule` expected a LightningDataModule, but got a DataLoader. "
                "Use ShardedDataModule.from_loader(train_loader, val_loader, num_shards=…)."
            )
        if not isinstance(datamodule, lightning_classes("LightningDataModule")):
            remedy = "For a folder of images, pass ImageFolderDataModule(folder)."
            raise TypeError(
                f"Argument `datamodule` expected a LightningDataModule, but got {datamodule!r:.60}. "
                f"{remedy if isinstance(datamodule, (str, Path)) else 'Pass an instance of one.'}"
            )
        check_kinds(int, num_shards=num_shards, num_samples=num_samples, seed=seed)
        if partition not in ("stratified", "iid"):
            raise ValueError(f"Argument `partition` expected 'stratified' or 'iid', but got {partition!r}.")
        check_at_least(1, num_shards=num_shards)
        check_at_least(1, optional=True, num_samples=num_samples)
        self.datamodule = datamodule
        self.num_shards = num_shards
        self.partition = partition
        self.seed = seed
        self.num_samples = num_samples
        self.prepare_data_per_node = datamodule.prepare_data_per_node
        self.plan: ShardPlan | None = None
        self._prepared: tuple[ShardPlan, Any] | None = None
        self.prepare_sampler: Callable[[ShardSampler, Dataset[Any]], None] | None = None
        self._pass_hooks(None)

    @classmethod
    def from_loader(
        cls, train_loader: DataLoader[Any], val_loader: Any = None, *, num_shards: int, **kwargs: Any
    ) -> Self:
        """Split bare loaders.

        Args:
            train_loader: Training data.
            val_loader: Validation data: a loader or several; ``None`` = none.
            num_shards: Number of shards, K.
            **kwargs: Other arguments of the class.
        """
        loaders = _Loaders(train_loader) if val_loader is None else _LoadersToValidate(train_loader, val_loader)
        return cls(loaders, num_shards, **kwargs)

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
            self._pass_hooks(value)

    def _pass_hooks(self, trainer: object) -> None:
        """Pass the trainer's hooks to the inner module; for those that it lacks, take its Lightning's default."""
        kinds = zip(lightning_classes("Trainer"), lightning_classes("LightningDataModule"), strict=True)
        default = next((kind for of, kind in kinds if isinstance(trainer, of)), pl.LightningDataModule)
        for name in _PASSED_HOOKS:
            hook = getattr(self.datamodule, name)
            inherited = str(getattr(hook, "__module__", "")).startswith(("lightning.pytorch.", "pytorch_lightning."))
            setattr(self, name, getattr(default, name).__get__(self) if inherited else hook)

    def setup(self, stage: str) -> None:
        """Set up the inner data module."""
        self.datamodule.setup(stage)

    def prepare_train_dataloader(self, plan: ShardPlan) -> None:
        """Make the loader that :meth:`train_dataloader` returns next, so that an impossible split is refused now."""
        self.plan = plan
        self._prepared = plan, self._make_train_dataloader()

    def train_dataloader(self) -> Any:
        """Return the inner loader, reading this process's shards."""
        prepared, self._prepared = self._prepared, None
        loader = prepared[1] if prepared and prepared[0] is self.plan else self._make_train_dataloader()
        samples = getattr(getattr(loader, "dataset", None), "samples", None)
        if self.prepare_sampler is not None and isinstance(samples, SeededSamples):
            self.prepare_sampler(loader.sampler, samples.dataset)
        return loader

    def forget_prepared(self) -> None:
        """Make the training loader anew, since the inner data module has changed."""
        self._prepared = None

    def _make_train_dataloader(self) -> Any:
        loader = self.datamodule.train_dataloader()
        if self.num_shards == 1:
            return loader
        if self.trainer is not None and self.plan is None:
            raise ValueError(
                f"ShardedDataModule with {self.num_shards} shards expected a ParameterAveragingCallback among the "
                f"trainer's callbacks, but got none. Add ParameterAveragingCallback(num_shards={self.num_shards})."
            )
        batching = read_batching(loader)
        if isinstance(loader.dataset, IterableDataset):
            return self._shard_stream(loader, batching)
        sampler = self._sampler(loader.dataset, batching)
        with unaugmented(loader.dataset):  # a resumed run may have samples to augment already
            data = fingerprint_of_samples(loader.dataset)
        sampler.identity = {"split": fingerprint_of_shards(sampler.shards), "training data": data}
        return rebuild(loader, SeededSamples(loader.dataset), sampler)

    def _sampler(self, dataset: Dataset[Any], batching: Batching) -> ShardSampler:
        """Return the sampler of the shards' batches."""
        size, plan = len(dataset), self.plan  # type: ignore[arg-type]
        if size == 0:
            raise ValueError("Argument `datamodule` expected a training set with samples, but got an empty one.")
        if batching.batch_sampler is not None:
            order, inner = SeededOrder(batching.batch_sampler, batched=True), None
            if hasattr(batching.batch_sampler, "sampler"):
                inner = SeededOrder(batching.batch_sampler.sampler)
                inner = inner if uses_its_sampler(batching.batch_sampler, inner) else None
            return RestrictedBatchSampler(order, inner, self._split(dataset, (inner or order).support(size)), plan)
        batches: dict[str, Any] = {"batch_size": batching.batch_size, "plan": plan, "drop_last": batching.drop_last}
        if batching.shuffle is None:
            order = SeededOrder(batching.sampler)
            shards = self._split(dataset, order.support(size))
            return RestrictedSampler(RestrictedOrder(order, shards), shards, **batches)
        return ShardSampler(self._split(dataset, torch.arange(size)), shuffle=batching.shuffle, **batches)

    def _split(self, dataset: Dataset[Any], indices: Tensor) -> list[Tensor]:
        labels = labels_of(dataset) if self.partition == "stratified" else None
        labels = labels if labels is None else labels[indices]
        how = "iid" if labels is None else f"stratified by {len(labels.unique())} classes"
        parts = partition(len(indices), self.num_shards, labels=labels, seed=self.seed)
        sizes = sorted({len(part) for part in parts})
        log.info("Shards: %d samples in %d shards of %s, %s.", len(indices), self.num_shards, sizes, how)
        return [indices[part] for part in parts]

    def _shard_stream(self, loader: DataLoader[Any], batching: Batching) -> DataLoader[Any]:
        stream = cast("IterableDataset[Any]", loader.dataset)
        length = self._length(stream, batching.batch_size)
        shards = split_stream(length, self.num_shards)
        sampler = ShardSampler(shards, batching.batch_size, plan=self.plan, shuffle=False, drop_last=batching.drop_last)
        sampler.identity = {
            "split": fingerprint_of_shards(shards),
            "training data": fingerprint_of_stream(stream, length=length, seed=self.seed),
        }
        return rebuild(loader, StreamedSamples(stream, seed=self.seed), sampler)

    def _length(self, stream: IterableDataset[Any], batch_size: int) -> int:
        """Samples of a stream in an epoch."""
        if self.num_samples is not None:
            return self.num_samples
        try:
            return len(stream)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            plan = self.plan
        if plan is None or plan.limit is None:
            raise ValueError(
                f"Argument `num_samples` expected the length of the stream {type(stream).__name__}, which does not "
                "tell it, but got None. Give it to ShardedDataModule, or set limit_train_batches to a number."
            )
        steps = max(plan.limit // plan.multiple_of, 1) * plan.multiple_of
        return steps * batch_size * self.num_shards * num_replicas(self.num_shards, plan.num_processes)


def inner_datamodule(trainer: pl.Trainer) -> Any:
    """The data module of a run, below what shards put around it; None if it has none."""
    datamodule = getattr(trainer, "datamodule", None)
    return datamodule.datamodule if isinstance(datamodule, ShardedDataModule) else datamodule


def find_wrapper(trainer: pl.Trainer, kind: type[Kind], *, who: str, remedy: str) -> Kind:
    """Return the wrapper of that class around the training set of a run that begins; else raise, for ``who`` needs it.

    Raises:
        ValueError: If there is none, with the remedy, a sentence.
    """
    found = find_layer(kind, inner_datamodule(trainer), getattr(trainer.fit_loop._data_source, "instance", None))
    if found is None:
        raise ValueError(
            f"{who} expected a training set in lightning_iet.data.{kind.__name__}, as an attribute of the data module"
            f" or in the loader that is given to fit, but found none. {remedy}"
        )
    return found


class _Loaders(DataModule):
    """A data module of one loader."""

    def __init__(self, train_loader: DataLoader[Any]) -> None:
        super().__init__()
        self.train_loader = train_loader

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training loader."""
        return self.train_loader


class _LoadersToValidate(_Loaders):
    """A data module of two loaders; a class of its own, since Lightning validates wherever this hook is defined."""

    def __init__(self, train_loader: DataLoader[Any], val_loader: Any) -> None:
        super().__init__(train_loader)
        self.val_loader = val_loader

    def val_dataloader(self) -> Any:
        """Return the validation loader."""
        return self.val_loader
