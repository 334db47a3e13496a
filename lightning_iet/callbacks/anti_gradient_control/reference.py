"""Images that a shard model does not train on, and losses without training: of these, or of a batch before its step."""

import copy
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
from torchmetrics import Metric

from lightning_iet.callbacks.anti_gradient_control.losses import LossSource, UnsupportedModule
from lightning_iet.data.augmentation import unaugmented
from lightning_iet.data.images import ImageDataModule
from lightning_iet.data.samples import labels_of
from lightning_iet.data.shard_sampler import ShardBatch, ShardSampler, StreamedSamples
from lightning_iet.data.sharding import inner_datamodule
from lightning_iet.data.splits import select_disjoint
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.errors import first_line
from lightning_iet.utilities.lightning import distinct_modules, do_nothing, isolated_module, patched_attribute
from lightning_iet.utilities.random import isolated_rng


class MeasuredStep:
    """Runs a module's ``training_step`` for its losses alone, without gradients.

    Logging is silenced, random generators and metrics are put back, and the first call after the losses were found is
    checked to change nothing in the module.

    Args:
        trainer: While a fit lasts.
        module: Its module.
        who: Needs the losses; it and what follows are for the message of a refusal.
        expected: What the step is called for.
        remedy: What to do about a refusal.

    Attributes:
        is_skipped: Whether the last step returned None, by which Lightning skips a batch.

    Raises:
        UnsupportedModule: If the module takes optimizer steps itself.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, *, who: str, expected: str, remedy: str
    ) -> None:
        self.trainer, self.module = trainer, module
        self.who, self.expected, self.remedy = who, expected, remedy
        self._is_checked = self.is_skipped = False
        if not module.automatic_optimization:
            raise self.unsupported("it takes optimizer steps itself (manual optimization)")

    def transfer(self, batch: Any) -> Any:
        """Do what Lightning does to a training batch."""
        batch = self.trainer.precision_plugin.convert_input(batch)
        batch = self.module._on_before_batch_transfer(batch, dataloader_idx=0)
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def measure(
        self, source: LossSource, make_batch: Callable[[], Any], batch_idx: int, *, seed: int, is_training: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the losses and timesteps of a batch, as the step shows them.

        Args:
            source: Where the losses of the module come from, open.
            make_batch: Returns the batch, on the device.
            batch_idx: What the step is told.
            seed: Of the random generators, in ``make_batch`` and in the step.
            is_training: Whether the module's parts stay in training or evaluation mode, each as it is; otherwise all
                are in evaluation mode.

        Raises:
            UnsupportedModule: If the step cannot be called on the batch, or changes the module.
        """
        is_known = bool(source.description)  # else the source removes hooks from the module in this step
        before = module_state(self.module) if is_known and not self._is_checked else None
        silent = partial(patched_attribute, self.module, replacement=do_nothing)
        with isolated_module(self.module, seed=seed), _kept_metrics(self.module), silent("log"):
            if not is_training:
                self.module.eval()
            try:
                batch = make_batch()
                with silent("log_dict"), self.trainer.precision_plugin.train_step_context():
                    found = source.measure(partial(self._step, batch, batch_idx))
            except UnsupportedModule:
                raise
            except Exception as error:
                raise self.unsupported(f"it raised {type(error).__name__}: {first_line(error)}") from error
        if before is not None:
            after = module_state(self.module)
            changed = [name for name in before | after if before.get(name) != after.get(name)]
            if changed:
                raise self.unsupported(f"it changed {', '.join(f'`{name}`' for name in changed[:3])}")
            self._is_checked = True
        return found

    def _step(self, batch: Any, batch_idx: int) -> Any:
        step = self.module.training_step
        takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        outputs = step(batch, batch_idx) if takes_index else step(batch)
        self.is_skipped = outputs is None
        return outputs

    def unsupported(self, reason: str) -> UnsupportedModule:
        """Return the refusal of a module."""
        return UnsupportedModule(
            f"{self.who} expected {type(self.module).__name__}.training_step {self.expected}, but {reason}."
            f" {self.remedy}"
        )


@contextmanager
def _kept_metrics(module: nn.Module) -> Iterator[None]:
    """Let the metrics of torchmetrics in a module be updated inside a block, and take that back after it."""
    kept = []
    for _, part in distinct_modules(module):
        if isinstance(part, Metric):
            names = [*part._defaults, "_update_count", "_computed", "_forward_cache"]
            kept.append((part, {name: _copied(getattr(part, name, None)) for name in names}))
    try:
        yield
    finally:
        for part, values in kept:
            for name, value in values.items():
                setattr(part, name, value)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


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
    parts = [(f"{path}." if path else "", part) for path, part in distinct_modules(module)]
    return {
        prefix + name: _summary(value, 4)
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
        return len(value), tuple(_summary(entry, depth - 1) for entry in list(value.values())[:100])
    if isinstance(value, Sequence | Set):
        return len(value), tuple(_summary(entry, depth - 1) for entry in list(value)[:100])
    if hasattr(value, "__dict__"):
        return tuple((name, _summary(entry, depth - 1)) for name, entry in vars(value).items())
    return id(value)


def _checksum(tensor: Tensor) -> Hashable:
    if tensor.layout != torch.strided or tensor.is_meta:
        return id(tensor)
    plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return tuple(tensor.shape), zlib.crc32(plain.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


Reference: TypeAlias = Literal["training", "held_out", "other_shards", "train"]
"""What a sample's loss is compared with: training images, images held out from training, those of other shards."""

_VALIDATION_IMAGES = 16  # *(our choice: they did as well as 128 in a trial, and are hardly missed there)*
_CACHED = 64  # images of a set of at most so many stay in memory; others are read each time


class ReferenceImages(Protocol):
    """Where reference images come from."""

    def draw(self, size: int, *, shard: int, epoch: int) -> Any:
        """Return a batch of ``size`` images as the training loader makes them, none of which the shard trains on.

        They are drawn with replacement from the global random generator.
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
        """See :class:`ReferenceImages`."""
        chosen = self.indices[torch.randint(len(self.indices), (size,))]
        return self.collate([self._read(index) for index in chosen.tolist()])

    def _read(self, index: int) -> Any:
        if len(self.indices) > _CACHED:
            return self.dataset[index]
        if index not in self._samples:
            self._samples[index] = self.dataset[index]
        return self._samples[index]

    def others(self) -> Dataset[Any]:
        """Return the images of the data set that are not taken."""
        taken = set(self.indices.tolist())
        return Subset(self.dataset, [i for i in range(len(self.dataset)) if i not in taken])  # type: ignore[arg-type]


class OtherShards:
    """The samples of all shards but the one at work, read as training reads them, but never augmented.

    Args:
        loader: Of :class:`~lightning_iet.data.ShardedDataModule`.

    Attributes:
        trained: Which samples each shard has trained on since the last averaging although they now belong to another,
            shape ``(K, n)``, boolean; ``None`` = none.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.sampler: Any = loader.sampler
        self.trained: Tensor | None = None

    def pool(self, shard: int) -> Tensor:
        """The samples that the shard's model has not trained on since the last averaging, shape ``(n,)``."""
        others = torch.cat([samples for number, samples in enumerate(self.sampler.shards) if number != shard])
        return others if self.trained is None else others[~self.trained[shard, others]]

    def draw(self, size: int, *, shard: int, epoch: int) -> Any:
        """See :class:`ReferenceImages`."""
        others = self.pool(shard)
        chosen = others[torch.randint(len(others), (size,))]
        batch = ShardBatch(shard, epoch, self.sampler.seed, chosen.tolist())
        with unaugmented(self.loader.dataset):
            return self.loader.collate_fn(self.loader.dataset[batch])


def other_shards(trainer: pl.Trainer) -> OtherShards:
    """Take the samples of other shards from the training loader; ValueError if it has none, or they cannot be read."""
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

    Of an ``anchor_set`` all are taken by default, of a validation set 16, with its classes in equal shares. At most
    half are taken of a validation set that is smaller than was asked for: synthetic, or without look-alikes of training
    images.

    Raises:
        ValueError: If there are none, fewer than asked for, or they cannot be read out of turn.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    anchors = getattr(datamodule, "anchor_set", None)
    with isolated_rng():
        loader = _validation_loader(trainer) if anchors is None else inner_datamodule(trainer).train_dataloader()
    dataset, where = (loader.dataset, "validation set") if anchors is None else (anchors, "`anchor_set`")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"Argument `reference` expected a map-style {where} for 'held_out', but got {type(dataset).__name__}, whose"
            " samples cannot be read out of turn. Give the data module a map-style data set as `anchor_set`."
        )
    length = len(dataset)
    wanted = number or (length if anchors is not None else min(length, _VALIDATION_IMAGES))
    datamodule = None if anchors is not None else inner_datamodule(trainer)
    chosen = choose_images(dataset, wanted, datamodule=datamodule, where=where)
    fewer = f" rather than {wanted}, so that half of this smaller set is left" if len(chosen) < wanted else ""
    rank_zero_info(
        f"AntiGradientControl: its unseen images are {len(chosen)} of the {length} of the {where}{fewer}."
        + (" An Evaluation leaves them out of its control." if anchors is None else "")
    )
    batched = loader.batch_sampler is not None
    collate = loader.collate_fn if batched else partial(_only_one, loader.collate_fn)
    return HeldOutImages(dataset, chosen, collate)


def choose_images(
    dataset: Dataset[Any], number: int | None, *, datamodule: object, where: str = "validation set"
) -> Tensor:
    """Choose the images of a held-out set that anti-gradient control compares with, the same ones in every run.

    Args:
        dataset: Map-style.
        number: How many; ``None`` = 16. At most half where the set has become smaller than was asked for: of synthetic
            images, or without look-alikes of training images.
        datamodule: Of the run, if the set is its validation set.
        where: What the set is, for the message.

    Returns:
        Their positions, shape ``(n,)``.

    Raises:
        ValueError: If there are not that many.
    """
    length = len(dataset)  # type: ignore[arg-type]
    wanted = number or min(length, _VALIDATION_IMAGES)
    if isinstance(datamodule, ImageDataModule) and (datamodule.synthetic or datamodule.num_look_alikes):
        wanted = min(wanted, max(length // 2, 1))
    if not 1 <= wanted <= length:
        raise ValueError(
            f"Argument `reference_images` expected at most the {length} images of the {where}, but got {wanted}."
            " Hold out more images, or take fewer."
        )
    labels = labels_of(dataset)  # in equal shares as far as they are known: stored order may be by class
    (chosen,) = select_disjoint(torch.zeros(length) if labels is None else labels, [wanted], seed=0)
    return chosen


def _only_one(convert: Callable[[Any], Any], samples: list[Any]) -> Any:
    """A batch of a loader that makes none: each sample is one already."""
    return convert(samples[0])


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


_REFERENCE_SEED = 1  # tells these seeds from those of training steps


class ReferenceLosses:
    """Measures the losses of a batch of reference images in every n-th step of each shard, by :class:`MeasuredStep`.

    All parts of the module are in eval mode. What is drawn depends on (seed, shard, number of the shard's steps so far)
    alone: not on the process count, nor on whether the run was interrupted.

    Args:
        reference: Which images.
        every: n.
        batch_size: Number of images; ``None`` = as many as in the training batch.
        num_images: Size of the held-out set; ``None`` = its default.

    Attributes:
        images: Where the images come from, while a run lasts.
        seed: Of the run; None before it, and restored in a run that goes on.
    """

    step: MeasuredStep
    losses: LossSource

    def __init__(self, reference: Reference, *, every: int, batch_size: int | None, num_images: int | None) -> None:
        self.reference = reference
        self.every = every
        self.batch_size = batch_size
        self.num_images = num_images
        self.images: ReferenceImages | None = None
        self.seed: int | None = None
        self._num_steps = 0
        self._batch_idx = 0
        self._is_due = False

    def choose_held_out(self, trainer: pl.Trainer) -> None:
        """Choose the held-out images, once the data are set up."""
        if self.reference == "held_out":
            self.images = held_out_images(trainer, self.num_images)

    def held_out_while_training(self, trainer: pl.Trainer) -> ReferenceImages | None:
        """Return the images that a run takes from its validation set: also of one that does not train, the same ones.

        None where there are none. Of a run that trains, those of every reference.
        """
        anchored = getattr(getattr(trainer, "datamodule", None), "anchor_set", None) is not None
        if self.images is not None or self.reference != "held_out" or anchored:
            return self.images
        try:
            return held_out_images(trainer, self.num_images)
        except ValueError as error:  # other data than those of the run: none of them steered it
            rank_zero_info(f"AntiGradientControl: all control images are measured. {error}")
            return None

    def open(self, trainer: pl.Trainer, module: pl.LightningModule, losses: LossSource) -> None:
        """Get ready to measure; refuse what cannot work before the first step."""
        self.losses = losses
        self.step = MeasuredStep(
            trainer,
            module,
            who="AntiGradientControl",
            expected="to tell the losses of unseen images and change nothing",
            remedy="Let it do so where `self.training` is False, or use reference='training'.",
        )
        if self.reference == "other_shards":
            self.images = other_shards(trainer)
        if self.seed is None:
            sampler = getattr(trainer.train_dataloader, "sampler", None)
            # Of a run of shards, the seed that all processes agree on.
            self.seed = sampler.seed if isinstance(sampler, ShardSampler) else torch.initial_seed() % 2**63

    def close(self) -> None:
        """Let go of the run."""
        self.images = None
        for name in ("step", "losses"):
            vars(self).pop(name, None)

    def begin_step(self, batch_idx: int) -> None:
        """A training step begins."""
        self._is_due = self._num_steps % self.every == 0
        self._num_steps += 1
        self._batch_idx = batch_idx

    def is_due(self) -> bool:
        """Whether reference images are to be measured now; once in a step."""
        due, self._is_due = self._is_due, False
        return due

    def measure(self, batch_size: int, *, shard: int, replica: int) -> tuple[Tensor, Tensor]:
        """Return losses and timesteps of reference images, both (n,), by default as many as the training batch has.

        Raises:
            UnsupportedModule: If the step cannot be called on them, changes the module, or shows no losses.
        """
        assert self.images is not None  # noqa: S101
        seed = derive_seed(self.seed or 0, shard, self._num_steps, replica, _REFERENCE_SEED)
        images, step, size = self.images, self.step, self.batch_size or batch_size

        def draw() -> Any:
            return step.transfer(images.draw(size, shard=shard, epoch=step.trainer.current_epoch))

        found = step.measure(self.losses.active, draw, self._batch_idx, seed=seed, is_training=False)
        if not found:
            raise step.unsupported("it showed no losses")
        losses, timesteps = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(timesteps)

    def shard_state(self) -> dict[str, Tensor]:
        """Return what shards do not share: how many steps each has taken."""
        return {"num_steps": torch.tensor(self._num_steps)}

    def load_shard_state(self, state: dict[str, Tensor]) -> None:
        """Put another shard's in place."""
        if "num_steps" in state:
            self._num_steps = int(state["num_steps"])
