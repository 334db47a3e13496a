"""Iterative ensemble training: shard models that train alone and are averaged now and then."""

import logging
import warnings
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_iet.callbacks.anti_gradient_control.callback import AntiGradientControl
from lightning_iet.callbacks.interruptions import Closing, begin_next_epoch, checkpoints_refused
from lightning_iet.callbacks.parameter_averaging.checks import (
    check_same_everywhere,
    check_same_run,
    check_schedulers,
    check_split,
    check_trainer,
    count_waiting_step,
    gather_shards,
    limit_per_shard,
    set_position,
)
from lightning_iet.callbacks.parameter_averaging.shard_log import ShardLog
from lightning_iet.callbacks.parameter_averaging.weight_averaging import (
    KeptBeside,
    ShardedAverage,
    averages_saved,
    called_early,
    keep_averages,
)
from lightning_iet.data.shard_sampler import ShardPlan, ShardSampler
from lightning_iet.data.sharding import ShardedDataModule
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.shards import ShardEngine
from lightning_iet.shards.engine import average_saved
from lightning_iet.shards.groups import broadcast_model, make_groups
from lightning_iet.shards.schedule import ShardCourse, own_shard
from lightning_iet.shards.state import FrozenWatch
from lightning_iet.shards.storage import Offload
from lightning_iet.utilities.checkpoints import use_atomic_checkpoints
from lightning_iet.utilities.lightning import Callback, lightning_classes, patched_attribute
from lightning_iet.utilities.random import seed_rng

log = logging.getLogger(__name__)


class ParameterAveragingCallback(Callback):
    r"""Trains K shard models, each on its own shard only, and averages them at intervals.

    .. math:: \theta \leftarrow \sum_k (n_k / n)\, \theta_k

    for trainable parameters, EMA weights and floating buffers; every shard continues from the average, with its own
    optimizer moments, learning-rate schedule and loss bank. Source: Liu et al., *Iterative Ensemble Training with
    Anti-Gradient Control for Mitigating Memorization in Diffusion Models*, ECCV 2024, https://arxiv.org/abs/2407.15328.

    Shards are not processes: K shards run on W processes for any W that divides K (W = 1 included), with the same
    final weights (bit for bit on one kind of CPU in float32, with equally many threads in each process). An epoch is
    one pass over all the data; a process walks through its shards one after the other. With W = n · K processes, n
    replicas train one shard, each with a batch of its own, and average gradients among themselves as ordinary DDP does.
    Validation, checkpoints and the finished model always show the average. Every step seeds the random generators from
    (seed, shard, epoch, step), so nothing that happens in between, nor the process count, changes a shard's course.

    Logged at the end of each epoch, for each shard k: ``shard_k/loss``, ``shard_k/skip_rate`` (with
    :class:`AntiGradientControl`) and, after averagings, ``shard_k/distance``, how far its trained parameters were from
    the average, as a share of the average's norm. A warning tells when distances explode.

    Args:
        num_shards: Number of shards, K; the data must be split by
            :class:`~lightning_iet.data.ShardedDataModule` with the same number. ``None`` = one shard per process, each
            process reading data of its own (``Trainer(use_distributed_sampler=False)``). 1 = off: nothing is changed.
        every_n_epochs: Length of a round in epochs. Default: 1 (if no steps are given).
        every_n_train_steps: Length of a round in steps **of each shard**, instead of epochs.
        weighting: ``"samples"`` weights each shard by its number of samples, ``"uniform"`` all alike.
        offload: Where the states (weights, EMA, optimizer) of those shards lie that are not at work: ``"none"`` = on
            the device, where a turn copies nothing; ``"cpu"`` = in host memory; ``"disk"`` = in memory-mapped files in
            the trainer's ``default_root_dir``. ``"auto"`` takes the first of them in whose free half they fit, and logs
            what it decided.

    Raises:
        ValueError: For values out of range, or both lengths given.
        MisconfigurationException: Before the first step, for settings that cannot work with shards.

    Example:
        >>> from lightning_iet import DigitsDataModule, ShardedDataModule
        >>> averaging = ParameterAveragingCallback(num_shards=4, every_n_epochs=10)
        >>> data = ShardedDataModule(DigitsDataModule(), num_shards=4)
        >>> trainer = Trainer(callbacks=[averaging], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(
        self,
        num_shards: int | None = None,
        *,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        weighting: Literal["samples", "uniform"] = "samples",
        offload: Offload = "auto",
    ) -> None:
        for name, value in (
            ("num_shards", num_shards),
            ("every_n_epochs", every_n_epochs),
            ("every_n_train_steps", every_n_train_steps),
        ):
            if value is not None and value < 1:
                raise ValueError(f"Argument `{name}` expected an integer ≥ 1, but got {value}.")
        if every_n_epochs is not None and every_n_train_steps is not None:
            raise ValueError("Arguments `every_n_epochs` and `every_n_train_steps` expected one of them, but got both.")
        if weighting not in ("samples", "uniform"):
            raise ValueError(f"Argument `weighting` expected 'samples' or 'uniform', but got {weighting!r}.")
        if offload not in get_args(Offload):
            raise ValueError(f"Argument `offload` expected one of {get_args(Offload)}, but got {offload!r}.")
        self.num_shards = num_shards
        self.every_n_epochs = every_n_epochs if every_n_train_steps is not None else (every_n_epochs or 1)
        self.every_n_train_steps = every_n_train_steps
        self.weighting = weighting
        self.offload = offload
        self.engine: ShardEngine | None = None
        self._saved: dict[str, Any] = {}
        self._stack = ExitStack()

    # --- before training -------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check everything that can be known before the data is read."""
        if stage != "fit":
            return
        # First in line: in the last batch of a round, whatever else looks at the model finds the average.
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        others = [callback for callback in others if not isinstance(callback, Closing | KeptBeside | ShardedAverage)]
        trainer.callbacks = [self, *others, Closing(self)]  # type: ignore[attr-defined]
        self._saved = {}
        shards, datamodule = self._shards(trainer), getattr(trainer, "datamodule", None)
        check_split(datamodule.num_shards if isinstance(datamodule, ShardedDataModule) else None, shards, trainer)
        if shards == 1:
            return
        check_trainer(trainer, pl_module, round_steps=self.every_n_train_steps)
        use_atomic_checkpoints(trainer)
        if isinstance(datamodule, ShardedDataModule):
            self.seed = 0
            datamodule.plan = self._plan(trainer)
            datamodule.train_dataloader()  # a split that cannot be made is refused before anything is written
        self.groups = make_groups(
            shards,
            trainer.world_size,
            trainer.global_rank,
            device_type=trainer.strategy.root_device.type,
            timeout=getattr(trainer.strategy, "_timeout", None),
        )
        if self.groups.within is not None:
            # DDP, which Lightning sets up after this hook, reduces gradients among the replicas of a shard only.
            kwargs = trainer.strategy._ddp_kwargs | {"process_group": self.groups.within}  # type: ignore[attr-defined]
            self._stack.enter_context(patched_attribute(trainer.strategy, "_ddp_kwargs", kwargs))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the data how the run distributes its shards, before the loader is made."""
        shards = self._shards(trainer)
        if self._saved:
            check_same_run(self._saved["identity"], {"number of shards": shards})
        if shards == 1:
            return
        self.seed = int(self._saved.get("seed", trainer.strategy.broadcast(torch.initial_seed() % 2**63)))
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
            limit=limit_per_shard(trainer, shards),
            epoch=self._saved.get("epoch", 0),
            done=tuple(self._saved.get("done", ())),
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the shards from the common starting weights, and stop gradients from crossing between processes."""
        shards = self._shards(trainer)
        if shards == 1:
            return
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        sampler = sampler if isinstance(sampler, ShardSampler) else own_shard(trainer, self.every_n_train_steps)
        self._course = ShardCourse(sampler, resumed=self._saved)
        check_schedulers(trainer)
        self._averages = self._stack.enter_context(keep_averages(trainer, pl_module))
        if self.groups.within is not None:
            # DDP has sent the weights of one replica to the others; all shards start from those of the first.
            broadcast_model(pl_module)
        self.engine = ShardEngine(
            trainer,
            pl_module,
            hosted=sampler.hosted,
            sizes=sampler.sizes if self.weighting == "samples" else [1.0] * shards,
            group=self.groups.across,
            offload=self.offload,
        )
        self._log = ShardLog(shards, pl_module.device)
        check_same_everywhere(self._identity(), trainer.world_size)
        if trainer.ckpt_path is not None:
            begin_next_epoch(trainer)
            self._resume(trainer)
        self._frozen, self._steps_taken = FrozenWatch(pl_module), 0
        self._module_hook = self._stack.enter_context(called_early(pl_module))
        if (
            isinstance(trainer.strategy, lightning_classes("strategies.ParallelStrategy"))
            and self.groups.within is None
        ):
            self._stack.enter_context(trainer.strategy.block_backward_sync())  # type: ignore[attr-defined]
            # DDP would still broadcast buffers before the first forward: from one shard's into all others'.
            self._stack.enter_context(patched_attribute(trainer.strategy.model, "require_forward_param_sync", False))
        self._controls = [c for c in trainer.callbacks if isinstance(c, AntiGradientControl)]  # type: ignore[attr-defined]
        for control in self._controls:
            control.join_replicas(self.groups.within)
        saving = averages_saved(average_saved(pl_module, self.engine), pl_module, self.engine, self._averages)
        self._stack.enter_context(patched_attribute(pl_module, "on_save_checkpoint", saving))

    # --- training --------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Turn to the shard whose batch this is, and seed its step."""
        if self.engine is None:
            return
        at = self._course.at(trainer.current_epoch, batch_idx)
        assert at.shard is not None  # noqa: S101 (Lightning calls no hook for the batch None)
        if at.first or self._steps_taken == 1:
            self._frozen.check()
        self._steps_taken += 1
        self.engine.activate(at.shard)
        self.engine.agreed = False
        for control in self._controls:
            control.shard = at.shard
        replica = (self.groups.replica,) if self.groups.replica else ()
        seed_rng(derive_seed(self.seed, at.shard, trainer.current_epoch, at.step, *replica))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average at the end of a round: here, because validation at the end of an epoch comes next."""
        if self.engine is None:
            return
        epoch, every = trainer.current_epoch, self.every_n_epochs
        at, last = self._course.at(epoch, batch_idx), self._course.is_last(batch_idx)
        if at.shard is None:
            count_waiting_step(trainer, batch_idx)
        else:
            self._log.add_step(trainer, at.shard, outputs)
            for average in self._averages:
                average.step(trainer, pl_module, outputs, batch, batch_idx)
            self._module_hook(outputs, batch, batch_idx)
        if self._course.count(at):
            for average in self._averages:
                average.end_epoch(trainer, pl_module)
            if not last:
                # Lightning steps schedules by epoch after the last batch only, which belongs to the last shard.
                trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        if at.averaging or (last and every is not None and (epoch + 1) % every == 0):
            self._average(self.engine)

    def _average(self, engine: ShardEngine) -> None:
        self._frozen.check()
        for shard, distance in zip(engine.states, engine.average(), strict=True):
            self._log.add("distance", shard, distance)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the shards did in this epoch."""
        if self.engine is not None:
            self._log.flush(trainer)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All shards of the run, gathered on the first process. Lightning calls it on every process."""
        if self.engine is None:
            return {}
        world_size = self.engine.trainer.world_size
        # Replicas of a shard are alike.
        states = {} if self.groups.replica else self.engine.state_dict()
        return {
            "identity": self._identity(),
            "seed": self.seed,
            **self._course.record(world_size),
            "agreed": self.engine.agreed,
            "whole": not self.engine.is_averaging,
            "log": self._log.state_dict(self.engine.trainer),
            "shards": gather_shards(states, world_size),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what :meth:`state_dict` returned until the model and the optimizers are there."""
        self._saved = state_dict

    def _identity(self) -> dict[str, Any]:
        """What must not change while a run goes on."""
        assert self.engine is not None  # noqa: S101
        return {
            "number of shards": len(self.engine.sizes),
            "shard weights": self.engine.sizes,
            "steps of each shard in an epoch": self._course.sampler.steps,
            "length of a round": f"{self.every_n_epochs} epochs, {self.every_n_train_steps} steps",
            **self._course.sampler.identity,
            "model": self.engine.layout.shapes,
        }

    def _resume(self, trainer: Trainer) -> None:
        assert self.engine is not None  # noqa: S101
        if not self._saved:
            log.warning("The checkpoint holds no shards: its weights and optimizer are where all shards start from.")
            if trainer.fit_loop.restarted_mid_epoch and isinstance(self._course.sampler, ShardSampler):
                set_position(trainer, 0)  # the batches of its epoch were others
            return
        if not self._saved["whole"]:
            raise MisconfigurationException(
                f"Argument `ckpt_path` expected a whole checkpoint, but got '{trainer.ckpt_path}', written in "
                "the middle of an averaging that an error broke off. Use the one before it."
            )
        check_same_run(self._saved["identity"], self._identity())
        self.engine.load_state_dict(self._saved.pop("shards"), agreed=self._saved["agreed"])
        self._log.load_state_dict(self._saved["log"], trainer)
        if isinstance(self._course.sampler, ShardSampler):  # data of its own go on where the user's loader does
            set_position(trainer, self._course.batches_before())
        # Lightning warns of batches that are None; here they are how a process waits for others.
        warnings.filterwarnings("ignore", message=".*yielded None.*")

    # --- whatever looks at the model sees the average ----------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average, in mid-round too; the next training step puts the shard at work back."""
        if self.engine is not None:
            self.engine.show_average()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The result of the run is the average, wherever in a round it ended."""
        if self.engine is not None and not self.engine.agreed:
            self._average(self.engine)
            self._log.flush(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave an ordinary model."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """With several processes, leave an ordinary model at once: the others may not be there for an average.

        A checkpoint that another callback would now write could not hold their shards; it is not written. One process
        keeps its shards until the other callbacks have written their last checkpoints.
        """
        if trainer.world_size > 1 and self.engine is not None:
            self._release()
            self._stack.enter_context(checkpoints_refused(trainer))

    def _release(self) -> None:
        self._stack.close()
        if self.engine is not None:
            self.engine.hide_average()
            self.engine.release()
            self.engine = None
            # What is drawn next must not depend on the process count, as the last step's seed does.
            seed_rng(derive_seed(self.seed, 1))
