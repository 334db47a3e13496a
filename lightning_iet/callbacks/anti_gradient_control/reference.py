"""Reference images: images that a shard model does not train on, and their losses."""

import random
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lightning_iet.callbacks.anti_gradient_control.losses import Refusal, Seam
from lightning_iet.data.samples import labels_of
from lightning_iet.data.shard_sampler import ShardBatch, ShardSampler
from lightning_iet.data.sharding import ShardedDataModule
from lightning_iet.data.splits import select_disjoint
from lightning_iet.data.streams import StreamedSamples
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.lightning import patched_attribute
from lightning_iet.utilities.random import isolated_module, isolated_rng

_DEPTH = 4
_MOST = 100  # entries of a container that are looked into


def module_state(module: nn.Module) -> dict[str, Hashable]:
    """Sum up all attributes of a module and its parts; where two summaries are the same, nothing has changed.

    Nothing that can be seen from outside, that is: not what closures, open files and objects without ``__dict__`` hold.
    It waits for the device.

    Returns:
        Summaries by the name of the attribute.

    Example:
        >>> module = nn.BatchNorm1d(2)
        >>> before = module_state(module)
        >>> _ = module(torch.rand(4, 2))
        >>> after = module_state(module)
        >>> [name for name in before if before[name] != after[name]]
        ['running_mean', 'running_var', 'num_batches_tracked']
    """
    parts = [(f"{path}." if path else "", part) for path, part in module.named_modules()]
    return {
        prefix + name: _summary(value, _DEPTH)
        for prefix, part in parts
        for name, value in {**vars(part), **part._parameters, **part._buffers}.items()
        if name not in ("_trainer", "_fabric", "_parameters", "_buffers", "_modules")
    }


def _summary(value: Any, depth: int) -> Hashable:
    if isinstance(value, Tensor):
        return _checksum(value)
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    if isinstance(value, torch.Generator):
        return _checksum(value.get_state())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, random.Random | np.random.RandomState):
        return repr(value.getstate() if isinstance(value, random.Random) else value.get_state())
    if isinstance(value, bool | int | float | str | bytes | None):
        return repr(value)
    if depth == 0 or isinstance(value, type | nn.Module) or callable(value):
        return id(value)
    if isinstance(value, Mapping):
        return len(value), tuple(_summary(entry, depth - 1) for entry in list(value.values())[:_MOST])
    if isinstance(value, Sequence | Set):
        return len(value), tuple(_summary(entry, depth - 1) for entry in list(value)[:_MOST])
    if hasattr(value, "__dict__"):
        return tuple((name, _summary(entry, depth - 1)) for name, entry in vars(value).items())
    return id(value)


def _checksum(tensor: Tensor) -> Hashable:
    if tensor.layout != torch.strided or tensor.is_meta:
        return id(tensor)
    plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return tuple(tensor.shape), zlib.crc32(plain.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


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
    (chosen,) = select_disjoint(torch.zeros(length) if labels is None else labels, [number], seed=0)
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


def check_readable(module: pl.LightningModule) -> None:
    """Refuse a module whose training step does more than tell a loss.

    Raises:
        Refusal: If it takes the optimizer steps itself.
    """
    if not module.automatic_optimization:
        raise _refusal(module, "it takes optimizer steps itself (manual optimization)")


class UnseenLosses:
    """Calls a module's ``training_step`` on unseen images and takes down the losses that its seam shows.

    In eval mode, without a backward pass, with logging silenced, and with random generators of its own: training takes
    the course that it would have taken. The first time, it looks whether the step has changed anything in the module.

    Args:
        trainer: At work.
        module: Its module.
        seam: Open, its observer being :meth:`hear` while :attr:`is_listening`.
        images: What to draw from.

    Attributes:
        is_listening: Whether what the seam shows are unseen images.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, seam: Seam, images: UnseenImages) -> None:
        self.trainer = trainer
        self.module = module
        self.seam = seam
        self.images = images
        self.is_listening = False
        self._heard: list[tuple[Tensor, Tensor]] = []
        self._is_trusted = False

    def hear(self, sample_loss: Tensor, timesteps: Tensor) -> None:
        """Take down the losses (n,) and timesteps (n,) of unseen images."""
        self._heard.append((sample_loss.detach(), timesteps.detach()))

    def measure(self, size: int, *, seed: int, shard: int, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Losses and timesteps of a batch of unseen images, both (n,).

        Args:
            size: Number of images.
            seed: Of the images, of their noise and of their timesteps.
            shard: Whose model is at work.
            batch_idx: Of the current training batch.

        Raises:
            Refusal: If the step cannot be called on them, changes the module, or shows no losses.
        """
        before = None if self._is_trusted else module_state(self.module)
        with (
            isolated_module(self.module, seed=seed),
            self._listening(),
            patched_attribute(self.module, "log", _say_nothing),
        ):
            self.module.eval()
            try:
                batch = self._on_device(self.images.draw(size, shard=shard, epoch=self.trainer.current_epoch))
                with (
                    patched_attribute(self.module, "log_dict", _say_nothing),
                    self.trainer.precision_plugin.train_step_context(),
                ):
                    self.seam.read(partial(self._step, batch, batch_idx))
            except Refusal:
                raise
            except Exception as error:
                reason = str(error).partition("\n")[0]
                raise _refusal(self.module, f"it raised {type(error).__name__}: {reason}") from error
        if not self._heard:
            raise _refusal(self.module, "it showed no losses")
        if before is not None:
            self._check(before)
        losses, timesteps = zip(*self._heard, strict=True)
        return torch.cat(losses), torch.cat(timesteps)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        self._heard, self.is_listening = [], True
        try:
            yield
        finally:
            self.is_listening = False

    def _on_device(self, batch: Any) -> Any:
        """What Lightning does to a training batch."""
        batch = self.trainer.precision_plugin.convert_input(batch)
        batch = self.module._on_before_batch_transfer(batch, dataloader_idx=0)
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def _step(self, batch: Any, batch_idx: int) -> Any:
        step = self.module.training_step
        numbered = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        return step(batch, batch_idx) if numbered else step(batch)

    def _check(self, before: dict[str, Any]) -> None:
        after = module_state(self.module)
        changed = [name for name in before | after if before.get(name) != after.get(name)]
        if changed:
            raise _refusal(self.module, f"it changed {', '.join(f'`{name}`' for name in changed[:3])}")
        self._is_trusted = True


def _refusal(module: nn.Module, reason: str) -> Refusal:
    return Refusal(
        f"AntiGradientControl expected {type(module).__name__}.training_step to tell the losses of unseen images and"
        f" change nothing, but {reason}. Let it do so where `self.training` is False, or use reference='train'."
    )


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """What is logged of unseen images."""


_OWN = 1  # tells these seeds from those of training steps


class Anchor:
    """Measures a batch of unseen images in every n-th step of each shard.

    What is drawn depends on (seed, shard, number of the shard's steps so far) alone: not on the process count, nor on
    whether the run was cut.

    Args:
        reference: ``"train"`` = nothing is measured.
        every: n.
        batch_size: Number of images; ``None`` = as many as in the training batch.
        num_images: Size of the held-out set; ``None`` = its default.

    Attributes:
        images: Where the images come from, while a run lasts.
    """

    def __init__(self, reference: Reference, *, every: int, batch_size: int | None, num_images: int | None) -> None:
        self.reference = reference
        self.every = every
        self.batch_size = batch_size
        self.num_images = num_images
        self.images: UnseenImages | None = None
        self._losses: UnseenLosses | None = None
        self._seed: int | None = None
        self._num_steps = 0
        self._batch_idx = 0
        self._is_due = False

    @property
    def is_on(self) -> bool:
        """Whether the bank is one of unseen images."""
        return self.reference != "train"

    def hears(self, sample_loss: Tensor, timesteps: Tensor) -> bool:
        """Take down losses (n,) and timesteps (n,) if they are those of unseen images; tell whether they are."""
        if self._losses is None or not self._losses.is_listening:
            return False
        self._losses.hear(sample_loss, timesteps)
        return True

    def find_held_out(self, trainer: pl.Trainer) -> None:
        """Choose the held-out images, once the data are set up."""
        if self.reference == "held_out":
            self.images = held_out_images(trainer, self.num_images)

    def open(self, trainer: pl.Trainer, module: pl.LightningModule, seam: Seam) -> None:
        """Get ready to measure; refuses what cannot work before the first step."""
        if not self.is_on:
            return
        check_readable(module)
        if self.reference == "other_shards":
            self.images = other_shards(trainer)
        assert self.images is not None  # noqa: S101
        self._losses = UnseenLosses(trainer, module, seam, self.images)
        if self._seed is None:
            sampler = getattr(trainer.train_dataloader, "sampler", None)
            # Of a run of shards, the seed that all processes agree on.
            self._seed = sampler.seed if isinstance(sampler, ShardSampler) else torch.initial_seed() % 2**63

    def begin_step(self, batch_idx: int) -> None:
        """A training step begins."""
        self._is_due = self.is_on and self._num_steps % self.every == 0
        self._num_steps += 1
        self._batch_idx = batch_idx

    def is_due(self) -> bool:
        """Whether this step has unseen images to measure; once in a step."""
        due, self._is_due = self._is_due, False
        return due

    def measure(self, batch_size: int, *, shard: int, replica: int) -> tuple[Tensor, Tensor]:
        """Losses and timesteps of unseen images, both (n,).

        Args:
            batch_size: Size of the training batch.
            shard: Whose model is at work.
            replica: Which of the processes that train it this is.
        """
        assert self._losses is not None  # noqa: S101
        seed = derive_seed(self._seed or 0, shard, self._num_steps, replica, _OWN)
        size = self.batch_size or batch_size
        return self._losses.measure(size, seed=seed, shard=shard, batch_idx=self._batch_idx)

    def close(self) -> None:
        """Let go of the run."""
        self.images = self._losses = None

    def shard_state(self) -> dict[str, Tensor]:
        """What shards do not share: how many steps each has taken."""
        return {"num_steps": torch.tensor(self._num_steps)} if self.is_on else {}

    def load_shard_state(self, state: dict[str, Tensor]) -> None:
        """Put another shard's in place."""
        if self.is_on and "num_steps" in state:
            self._num_steps = int(state["num_steps"])

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must know."""
        return {"reference": self.reference, "seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on; ValueError if the bank is one of other images."""
        reference = state_dict.get("reference", "train")
        if reference != self.reference:
            raise ValueError(
                f"Argument `reference` expected {reference!r}, with which the checkpoint was trained, but got"
                f" {self.reference!r}. Go on with the same reference, or train afresh."
            )
        self._seed = state_dict.get("seed")
