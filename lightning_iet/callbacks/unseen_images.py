"""Images that a shard's model does not train on: held out from all shards, or those of the other shards."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lightning_iet.data.images import draw_disjoint
from lightning_iet.data.labels import labels_of
from lightning_iet.data.shard_sampler import ShardBatch, ShardSampler
from lightning_iet.data.sharding import ShardedDataModule
from lightning_iet.data.streams import StreamedSamples
from lightning_iet.utilities.random import isolated_rng

__all__ = ["HeldOutImages", "OtherShards", "Reference", "UnseenImages", "held_out_images", "other_shards"]

Reference: TypeAlias = Literal["train", "held_out", "other_shards"]
"""What a sample's loss is compared with: training images, images held out from training, those of other shards."""

_USUAL = (
    16  # images of a validation set *(our choice: they did as well as 128 in a trial, and are hardly missed there)*
)
_KEPT = 64  # at most so many stay in memory; others are read anew each time


class UnseenImages(Protocol):
    """Where unseen images come from."""

    def draw(self, size: int, *, shard: int, epoch: int) -> Any:
        """A batch as the training loader makes them.

        Args:
            size: Number of images, drawn with replacement from the global random generator.
            shard: Whose model does not train on them.
            epoch: Current epoch.
        """


class HeldOutImages:
    """Images that no shard trains on.

    Args:
        dataset: Map-style.
        indices: Those of its samples that are taken, shape ``(n,)``.
        collate: Makes a batch of samples.

    Example:
        >>> images = HeldOutImages([10, 11, 12], torch.tensor([2]), collate=torch.tensor)
        >>> images.draw(2, shard=0, epoch=0)
        tensor([12, 12])
    """

    def __init__(self, dataset: Dataset[Any], indices: Tensor, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset = dataset
        self.indices = indices
        self.collate = collate
        self._samples: dict[int, Any] = {}

    def draw(self, size: int, *, shard: int, epoch: int) -> Any:
        """See :class:`UnseenImages`."""
        chosen = self.indices[torch.randint(len(self.indices), (size,))]
        return self.collate([self._read(index) for index in chosen.tolist()])

    def _read(self, index: int) -> Any:
        if len(self.indices) > _KEPT:
            return self.dataset[index]
        if index not in self._samples:
            self._samples[index] = self.dataset[index]
        return self._samples[index]

    def others(self) -> Dataset[Any]:
        """The images of the data set that are not taken."""
        taken = set(self.indices.tolist())
        return Subset(self.dataset, [i for i in range(len(self.dataset)) if i not in taken])  # type: ignore[arg-type]


class OtherShards:
    """The samples of all shards but the one at work, read as training reads them.

    Args:
        loader: Of :class:`~lightning_iet.data.ShardedDataModule`.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.sampler: Any = loader.sampler

    def draw(self, size: int, *, shard: int, epoch: int) -> Any:
        """See :class:`UnseenImages`."""
        others = torch.cat([samples for number, samples in enumerate(self.sampler.shards) if number != shard])
        chosen = others[torch.randint(len(others), (size,))]
        batch = ShardBatch(shard, epoch, self.sampler.seed, chosen.tolist())
        return self.loader.collate_fn(self.loader.dataset[batch])


def other_shards(trainer: pl.Trainer) -> OtherShards:
    """Take the samples of other shards from the training loader.

    Raises:
        ValueError: If there are no other shards, or this process cannot read their samples.
    """
    loader: Any = trainer.train_dataloader
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, ShardSampler):
        found = "but got one" if trainer.world_size == 1 else "but each process reads data of its own"
        raise ValueError(
            f"Argument `reference` expected shards in a ShardedDataModule for 'other_shards', {found}. Train with 2 or"
            " more shards (ParameterAveragingCallback and ShardedDataModule; --averaging.num_shards 2), or use"
            " reference='held_out'."
        )
    if isinstance(getattr(loader.dataset, "samples", None), StreamedSamples):
        raise ValueError(
            "Argument `reference` expected a map-style training set for 'other_shards', but got a stream, whose samples"
            " cannot be read out of turn. Use reference='held_out'."
        )
    return OtherShards(loader)


def held_out_images(trainer: pl.Trainer, number: int | None) -> HeldOutImages:
    """Take images from the data module's ``anchor_set`` if it has one, else from the validation set.

    Of an ``anchor_set`` all are taken by default, of a validation set 16, with its classes in equal shares.

    Args:
        trainer: A trainer whose data are set up.
        number: How many images are taken; ``None`` = the default.

    Raises:
        ValueError: If there are none, fewer than asked for, or they cannot be read out of turn.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    anchors = getattr(datamodule, "anchor_set", None)
    with isolated_rng():
        loader = _validation_loader(trainer) if anchors is None else _inner(datamodule).train_dataloader()
    dataset, where = (loader.dataset, "validation set") if anchors is None else (anchors, "`anchor_set`")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"Argument `reference` expected a map-style {where} for 'held_out', but got {type(dataset).__name__}, whose"
            " samples cannot be read out of turn. Give the data module a map-style data set as `anchor_set`."
        )
    length = len(dataset)
    wanted = number or (length if anchors is not None else min(length, _USUAL))
    if not 1 <= wanted <= length:
        raise ValueError(
            f"Argument `reference_images` expected at most the {length} images of the {where}, but got {wanted}."
            " Hold out more images, or take fewer."
        )
    rank_zero_info(
        f"AntiGradientControl: its unseen images are {wanted} of the {length} of the {where}."
        + (" An Evaluation leaves them out of its control." if anchors is None else "")
    )
    batched = loader.batch_sampler is not None
    collate = loader.collate_fn if batched else partial(_only_one, loader.collate_fn)
    return HeldOutImages(dataset, _spread(dataset, wanted), collate)


def _spread(dataset: Dataset[Any], number: int) -> Tensor:
    """Some samples, with the classes in equal shares as far as they are known: stored order may be by class."""
    labels = labels_of(dataset)
    length = len(dataset)  # type: ignore[arg-type]
    (chosen,) = draw_disjoint(torch.zeros(length) if labels is None else labels, [number], seed=0)
    return chosen


def _only_one(convert: Callable[[Any], Any], samples: list[Any]) -> Any:
    """A batch of a loader that makes none: each sample is one already."""
    return convert(samples[0])


def _inner(datamodule: pl.LightningDataModule) -> pl.LightningDataModule:
    return datamodule.datamodule if isinstance(datamodule, ShardedDataModule) else datamodule


def _validation_loader(trainer: pl.Trainer) -> DataLoader[Any]:
    """The first one, asked for at its source: Lightning's own copy comes later, or not at all."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    found = source.dataloader() if source.is_defined() and source.instance is not None else None
    first = (found[0] if found else None) if isinstance(found, Sequence) else found
    if not isinstance(first, DataLoader):
        named = "none" if first is None else type(first).__name__
        raise ValueError(
            f"Argument `reference` expected a validation DataLoader for 'held_out', but got {named}. Give one to fit,"
            " or set `anchor_set`, a data set of images that are held out, in the data module."
        )
    return first
