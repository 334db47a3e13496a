"""Iterative ensemble training: shard models that train alone and are averaged now and then."""

import logging
from contextlib import ExitStack
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, DistributedSampler

from lightning_iet.data.sharding import ShardedDataModule, ShardPlan, ShardSampler
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.functional.sharding import ShardStep, hosted_shards, walk
from lightning_iet.shards import ShardEngine
from lightning_iet.utilities.checks import check_schedulers, check_trainer
from lightning_iet.utilities.random import seed_rng

__all__ = ["ParameterAveragingCallback"]

log = logging.getLogger(__name__)


class ParameterAveragingCallback(pl.Callback):
    r"""Trains K shard models, each on its own shard only, and averages them at intervals.

    .. math:: \theta \leftarrow \sum_k (n_k / n)\, \theta_k

    for trainable parameters, EMA weights and floating buffers; every shard continues from the average, with its own
    optimizer moments, learning-rate schedule and loss bank. Source: Liu et al., *Iterative Ensemble Training with
    Anti-Gradient Control for Mitigating Memorization in Diffusion Models*, ECCV 2024, https://arxiv.org/abs/2407.15328.

    Shards are not processes: K shards run on W processes for any W that divides K (W = 1 included), with the same
    final weights. An epoch is one pass over all the data; a process walks through its shards one after the other.
    Validation, checkpoints and the finished model always show the average. Every step seeds the random generators from
    (seed, shard, epoch, step), so nothing that happens in between, nor the process count, changes a shard's course.

    Args:
        num_shards: Number of shards, K; the data must be split by
            :class:`~lightning_iet.data.ShardedDataModule` with the same number. ``None`` = one shard per process, each
            process reading data of its own (``Trainer(use_distributed_sampler=False)``). 1 = off: nothing is changed.
        every_n_epochs: Length of a round in epochs. Default: 1 (if no steps are given).
        every_n_train_steps: Length of a round in steps **of each shard**, instead of epochs.
        weighting: ``"samples"`` weights each shard by its number of samples, ``"uniform"`` all alike.

    Raises:
        ValueError: For values out of range, or both lengths given.
        MisconfigurationException: Before the first step, for settings that cannot work with shards.

    Example:
        >>> from lightning_iet import DigitsDataModule, ShardedDataModule
        >>> averaging = ParameterAveragingCallback(num_shards=4, every_n_epochs=10)
        >>> data = ShardedDataModule(DigitsDataModule(), num_shards=4)
        >>> trainer = pl.Trainer(callbacks=[averaging], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(
        self,
        num_shards: int | None = None,
        *,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        weighting: Literal["samples", "uniform"] = "samples",
    ) -> None:
        for name, value in (
            ("num_shards", num_shards),
            ("every_n_epochs", every_n_epochs),
            ("every_n_train_steps", every_n_train_steps),
        ):
            if value is not None and value < 1:
                raise ValueError(f"Argument `{name}` expected an integer ≥ 1, but got {value}.")
        if every_n_epochs is not None and every_n_train_steps is not None:
            raise ValueError(
                "Arguments `every_n_epochs` and `every_n_train_steps` expected one of them, but got both. Leave one out."
            )
        if weighting not in ("samples", "uniform"):
            raise ValueError(f"Argument `weighting` expected 'samples' or 'uniform', but got {weighting!r}.")
        self.num_shards = num_shards
        self.every_n_epochs = every_n_epochs if every_n_train_steps is not None else (every_n_epochs or 1)
        self.every_n_train_steps = every_n_train_steps
        self.weighting = weighting
        self.engine: ShardEngine | None = None
        self._walk: list[ShardStep] = []
        self._stack = ExitStack()

    # --- before training -------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check everything that can be known before the data is read."""
        if stage != "fit":
            return
        datamodule = getattr(trainer, "datamodule", None)
        in_data = datamodule.num_shards if isinstance(datamodule, ShardedDataModule) else None
        shards = self._shards(trainer)
        if in_data not in (None, shards):
            raise MisconfigurationException(
                f"Argument `num_shards` expected the same value in ShardedDataModule and in "
                f"ParameterAveragingCallback, but got {in_data} and {shards}."
            )
        if shards == 1:
            return
        check_trainer(trainer, pl_module)
        hosted_shards(shards, trainer.world_size, trainer.global_rank)
        if in_data is None and shards != trainer.world_size:
            raise MisconfigurationException(
                f"ParameterAveragingCallback expected data split into {shards} shards, but the run has "
                f"{trainer.world_size} process(es) and no ShardedDataModule. Wrap the data module: "
                f"ShardedDataModule(datamodule, num_shards={shards})."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the data how the run distributes its shards, before the loader is made."""
        if self._shards(trainer) == 1:
            return
        self.seed = trainer.strategy.broadcast(torch.initial_seed() % 2**63)
        datamodule = getattr(trainer, "datamodule", None)
        if isinstance(datamodule, ShardedDataModule):
            datamodule.plan = self._plan(trainer)

    def _shards(self, trainer: Trainer) -> int:
        return trainer.world_size if self.num_shards is None else self.num_shards

    def _plan(self, trainer: Trainer) -> ShardPlan:
        shards = self._shards(trainer)
        return ShardPlan(
            num_shards=shards,
            num_processes=trainer.world_size,
            rank=trainer.global_rank,
            seed=self.seed,
            round_steps=self.every_n_train_steps,
            multiple_of=trainer.accumulate_grad_batches,
            limit=_limit_per_shard(trainer, shards // trainer.world_size),
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the shards from the common starting weights, and stop gradients from crossing between processes."""
        shards = self._shards(trainer)
        if shards == 1:
            return
        sampler = _sampler(trainer)
        if isinstance(sampler, ShardSampler):
            sizes, steps = [float(size) for size in sampler.sizes], sampler.steps
        else:
            sizes, steps = _own_data(trainer)
        check_schedulers(trainer, steps)
        self._steps = steps
        self.engine = ShardEngine(
            trainer,
            pl_module,
            hosted=hosted_shards(shards, trainer.world_size, trainer.global_rank),
            sizes=sizes if self.weighting == "samples" else [1.0] * shards,
            group=dist.group.WORLD if trainer.world_size > 1 else None,
        )
        if isinstance(trainer.strategy, ParallelStrategy):
            self._stack.enter_context(trainer.strategy.block_backward_sync())

    # --- training --------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan the epoch's walk through the shards."""
        if self.engine is not None:
            hosted = list(self.engine.states)
            self._walk = walk(hosted, self._steps, epoch=trainer.current_epoch, round_steps=self.every_n_train_steps)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Turn to the shard whose batch this is, and seed its step."""
        if self.engine is None:
            return
        at = self._walk[batch_idx]
        self.engine.activate(at.shard)
        self.engine.agreed = False
        seed_rng(derive_seed(self.seed, at.shard, trainer.current_epoch, at.step))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average at the end of a round: here, because validation at the end of an epoch comes next."""
        if self.engine is None:
            return
        at, last = self._walk[batch_idx], batch_idx == len(self._walk) - 1
        if at.step == self._steps - 1 and not last:
            # Lightning steps schedules by epoch after the last batch only, which belongs to the last shard.
            trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        epochs = self.every_n_epochs
        if at.averaging or (last and epochs is not None and (trainer.current_epoch + 1) % epochs == 0):
            self.engine.average()

    def describe(self, trainer: Trainer) -> str:
        """Where the run is, in words, such as ``epoch 12/40, round 2/4, shard 3/4``."""
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs
        parts = [f"epoch {epoch}/{epochs}" if epochs and epochs > 0 else f"epoch {epoch}"]
        if self.engine is not None:
            if self.every_n_epochs is not None and epochs and epochs > 0:
                parts.append(f"round {-(-epoch // self.every_n_epochs)}/{-(-epochs // self.every_n_epochs)}")
            parts.append(f"{len(self.engine.sizes)} shards")
        return ", ".join(parts)

    # --- whatever looks at the model sees the average ----------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average, in mid-round too."""
        if self.engine is not None:
            self.engine.show_average()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the shard at work back."""
        if self.engine is not None:
            self.engine.hide_average()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The result of the run is the average, wherever in a round it ended."""
        self._stack.close()
        if self.engine is not None and not self.engine.agreed:
            self.engine.average()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave an ordinary model."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave an ordinary model and an ordinary strategy. No averaging: other processes may not be there."""
        self._stack.close()
        self._release()

    def _release(self) -> None:
        if self.engine is not None:
            self.engine.hide_average()
            self.engine.release()
            self.engine = None


def _sampler(trainer: Trainer) -> object:
    return getattr(trainer.train_dataloader, "sampler", None)


def _limit_per_shard(trainer: Trainer, hosted: int) -> int | None:
    """Steps that `limit_train_batches`, a limit on the batches of a process, leaves to each of its shards."""
    limit = trainer.limit_train_batches
    if isinstance(limit, int):
        return max(limit // hosted, 1)
    if limit == 1.0:
        return None
    raise MisconfigurationException(
        f"ParameterAveragingCallback expected limit_train_batches as a number of batches, but got the share {limit}. "
        "Use an integer."
    )


def _own_data(trainer: Trainer) -> tuple[list[float], int]:
    """Sizes of all shards, and steps of each, where every process reads data of its own."""
    loader = trainer.train_dataloader
    if isinstance(_sampler(trainer), DistributedSampler):
        raise MisconfigurationException(
            "ParameterAveragingCallback expected every process to read a fixed shard, but got a DistributedSampler, which "
            "deals the samples out anew in each epoch. Use Trainer(use_distributed_sampler=False) with data of its own "
            "on each process, or ShardedDataModule(datamodule, num_shards=…)."
        )
    size = len(loader.dataset) if isinstance(loader, DataLoader) and hasattr(loader.dataset, "__len__") else None
    everyone: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(everyone, (size, trainer.num_training_batches))
    sizes, steps = [size for size, _ in everyone], [int(steps) for _, steps in everyone]
    if None in sizes:
        raise MisconfigurationException(
            "ParameterAveragingCallback expected training data of known size to weight the shards by, but got none. "
            "Use weighting='uniform'."
        )
    if len(set(steps)) > 1:
        log.warning("Shards have %s batches; each epoch takes the first %d of every shard.", steps, min(steps))
        trainer.fit_loop.max_batches = min(steps)
        if isinstance(trainer.val_check_interval, float):
            trainer.val_check_batch = max(1, int(min(steps) * trainer.val_check_interval))
    return [float(size) for size in sizes], min(steps)
