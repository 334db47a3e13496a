"""Iterative ensemble training: shard models that train alone and are averaged at intervals."""

import logging
import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_iet.callbacks.anti_gradient_control.callback import AntiGradientControl
from lightning_iet.callbacks.interruptions import resume_from
from lightning_iet.callbacks.parameter_averaging.checks import (
    LateWatch,
    check_same_run,
    check_schedulers,
    check_split,
    check_trainer,
    limit_per_shard,
)
from lightning_iet.data.shard_sampler import ShardPlan, ShardSampler
from lightning_iet.data.sharding import ShardedDataModule
from lightning_iet.functional.checks import check_at_least, check_choice, check_kinds
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.shards import ShardEngine, ShardwiseCallback
from lightning_iet.shards.ema import (
    UnregisteredAverages,
    sharded_averages,
)
from lightning_iet.shards.engine import ShardSchedule, own_shard
from lightning_iet.shards.groups import broadcast_model, check_same_everywhere, gather_shards, make_groups
from lightning_iet.shards.layout import FrozenWatch
from lightning_iet.shards.state import Offload
from lightning_iet.utilities.checkpoints import next_epoch, reopen_epoch, skips_epoch_end, took_last_batch
from lightning_iet.utilities.lightning import (
    Callback,
    Position,
    do_nothing,
    find_callback,
    find_callbacks,
    is_cut_short,
    lightning_classes,
    log_values,
    loss_of,
    num_shards_of,
    order_callbacks,
    patched_attribute,
)
from lightning_iet.utilities.random import seed_rng
from lightning_iet.utilities.text import counted

log = logging.getLogger(__name__)

_Saving = Callable[[dict[str, Any]], None]


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
    (seed, shard, epoch, step), so that neither other callbacks nor the process count change how a shard trains.

    Logged at the end of each epoch, for each shard k: ``shard_k/loss``, ``shard_k/skip_rate`` (with
    :class:`AntiGradientControl`) and, after averagings, ``shard_k/distance``, how far its trained parameters were from
    the average, as a share of the average's norm. A warning tells when distances explode.

    Args:
        num_shards: Number of shards, K; the data must be split by
            :class:`~lightning_iet.data.ShardedDataModule` with the same number. ``None`` = one shard per process, each
            process reading data of its own (``Trainer(use_distributed_sampler=False)``). 1 = off: nothing is changed.
        every_n_epochs: Length of a round in epochs. Default: 1 (if no steps are given).
        every_n_train_steps: Length of a round in batches **of each shard**, instead of epochs: in its steps, unless
            gradients are accumulated; then a multiple of ``accumulate_grad_batches``.
        weighting: ``"samples"`` weights each shard by its number of samples, ``"uniform"`` all alike.
        offload: Where the states (weights, EMA, optimizer) of inactive shards lie: ``"none"`` = on the device, where
            activating a shard copies nothing; ``"cpu"`` = in host memory; ``"disk"`` = in memory-mapped files in the
            trainer's ``default_root_dir``. ``"auto"`` takes the first of them in whose free half they fit, and logs
            the decision.

    Raises:
        TypeError: For numbers that are no integers.
        ValueError: For values out of range, or both lengths given.
        MisconfigurationException: Before the first step, for settings that cannot work with shards.

    Example:
        >>> from lightning_iet import DigitsDataModule, ShardedDataModule
        >>> averaging = ParameterAveragingCallback(num_shards=4, every_n_epochs=10)
        >>> data = ShardedDataModule(DigitsDataModule(), num_shards=4)
        >>> trainer = Trainer(callbacks=[averaging], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    position = Position.AVERAGING

    def __init__(
        self,
        num_shards: int | None = None,
        *,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        weighting: Literal["samples", "uniform"] = "samples",
        offload: Offload = "auto",
    ) -> None:
        check_kinds(int, num_shards=num_shards, every_n_epochs=every_n_epochs, every_n_train_steps=every_n_train_steps)
        every = {"every_n_epochs": every_n_epochs, "every_n_train_steps": every_n_train_steps}
        check_at_least(1, optional=True, num_shards=num_shards, **every)
        if every_n_epochs is not None and every_n_train_steps is not None:
            raise ValueError("Arguments `every_n_epochs` and `every_n_train_steps` expected one of them, but got both.")
        check_choice("weighting", weighting, ("samples", "uniform"))
        check_choice("offload", offload, get_args(Offload))
        self.num_shards = num_shards
        self.every_n_epochs = every_n_epochs if every_n_train_steps is not None else (every_n_epochs or 1)
        self.every_n_train_steps = every_n_train_steps
        self.weighting = weighting
        self.offload = offload
        self.engine: ShardEngine | None = None
        self._saved: dict[str, Any] = {}
        self._skips_epoch_end = False  # whether a resumed run goes on behind the hooks of the end of an epoch
        self._stack = ExitStack()

    # --- before training -------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check everything that can be known before the data is read."""
        if stage != "fit":
            return
        order_callbacks(trainer, find_callback(trainer, _ReleaseAfterException) or _ReleaseAfterException())
        self._saved = {}
        self._shards = num_shards_of(trainer, self)
        data: object = getattr(trainer, "datamodule", None)
        self._data = data if isinstance(data, ShardedDataModule) else None
        check_split(None if self._data is None else self._data.num_shards, self._shards, trainer)
        if self._shards == 1:
            return
        check_trainer(trainer, pl_module, round_steps=self.every_n_train_steps)
        resume_from(trainer, trainer.ckpt_path)
        self.seed = int(trainer.strategy.broadcast(torch.initial_seed() % 2**63))
        if self._data is not None and trainer.ckpt_path is None:
            # Now, so that a split that cannot be made is refused before anything is written.
            self._data.prepare_train_dataloader(self._plan(trainer))
        self.groups = make_groups(
            self._shards,
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
        """Tell the data where a resumed run continues, before the loader is made."""
        if self._saved:
            check_same_run(self._saved["identity"], {"number of shards": self._shards})
        if self._shards > 1 and trainer.ckpt_path is not None:
            self.seed = self._saved.get("seed", self.seed)
            if self._data is not None:
                self._data.plan = self._plan(trainer)

    def _plan(self, trainer: Trainer) -> ShardPlan:
        """Describe how the run distributes its shards, and where it starts."""
        return ShardPlan(
            num_shards=self._shards,
            num_processes=trainer.world_size,
            rank=trainer.global_rank,
            seed=self.seed,
            round_steps=self.every_n_train_steps,
            multiple_of=trainer.accumulate_grad_batches,
            limit=limit_per_shard(trainer, self._shards),
            epoch=self._saved.get("epoch", 0),
            done=tuple(self._saved.get("done", ())),
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the shards from the common starting weights, and stop gradients from crossing between processes."""
        if self._shards == 1:
            return
        self.engine = self._make_shards(trainer, pl_module)
        check_same_everywhere(self._identity(), trainer.world_size, remedy="Start all with the same command and data.")
        if trainer.ckpt_path is not None:
            self._resume(trainer, pl_module, self.engine)
        self._frozen, self._steps_taken = FrozenWatch(pl_module, self.engine.own_tensors), 0
        self._late = LateWatch(trainer, pl_module, self.engine.own_tensors)
        self._epoch = -1
        self._options: list[list[dict[str, Any]]] | None = None
        self._stack.callback(self._late.end_step)
        # Many modules update their average of the weights in this hook, which Lightning calls after all callbacks: too
        # late in the last batch of a round, when the shards are averaged already, and for checkpoints of the step.
        self._module_hook = pl_module.on_train_batch_end
        self._stack.enter_context(patched_attribute(pl_module, "on_train_batch_end", do_nothing))
        parallel = isinstance(trainer.strategy, lightning_classes("strategies.ParallelStrategy"))
        if parallel and self.groups.within is None:
            self._stack.enter_context(trainer.strategy.block_backward_sync())  # type: ignore[attr-defined]
            # DDP would still broadcast buffers before the first forward: from one shard's into all others'.
            self._stack.enter_context(patched_attribute(trainer.strategy.model, "require_forward_param_sync", False))
        self._controls = find_callbacks(trainer, AntiGradientControl)
        for control in self._controls:
            control.replicas = self.groups.within
        saving = self._saving(self.engine, pl_module, pl_module.on_save_checkpoint)
        self._stack.enter_context(patched_attribute(pl_module, "on_save_checkpoint", saving))

    def _make_shards(self, trainer: Trainer, module: LightningModule) -> ShardEngine:
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        self._sampler = sampler if isinstance(sampler, ShardSampler) else own_shard(trainer, self.every_n_train_steps)
        self._schedule = ShardSchedule(self._sampler, resumed=self._saved)
        self._log = ShardLog(self._shards, module.device)
        check_schedulers(trainer)
        self._averages = self._stack.enter_context(sharded_averages(trainer, module))
        shardwise: list[ShardwiseCallback] = [
            *find_callbacks(trainer, ShardwiseCallback),  # type: ignore[type-abstract]
            *self._averages,
        ]
        if unregistered := UnregisteredAverages(module):
            shardwise.append(unregistered)
        if self.groups.within is not None:
            # DDP has sent the weights of one replica to the others; all shards start from those of the first.
            broadcast_model(module)
        return ShardEngine(
            trainer,
            module,
            hosted=self._sampler.hosted,
            sizes=self._sampler.sizes if self.weighting == "samples" else [1.0] * self._shards,
            callbacks=shardwise,
            group=self.groups.across,
            offload=self.offload,
        )

    # --- training --------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Activate the shard whose batch this is, and seed its step."""
        if self.engine is None:
            return
        at = self._schedule.at(trainer.current_epoch, batch_idx)
        assert at.shard is not None  # noqa: S101 (Lightning calls no hook for the batch None)
        if at.first or self._steps_taken == 1 or self._late.is_watching:
            self._late.check(self._steps_taken)
        if at.first or self._steps_taken == 1:
            self._frozen.check()
        if self._epoch != trainer.current_epoch:
            self._epoch = trainer.current_epoch
            self._take_in(self.engine, pl_module)
        self._late.begin_step()
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
        at, last = self._schedule.at(epoch, batch_idx), self._schedule.is_last(batch_idx)
        if at.shard is None:
            _count_step_of_others(trainer, batch_idx)
        else:
            self._log.add_step(trainer, at.shard, outputs)
            for average in self._averages:
                average.step(trainer, pl_module, outputs, batch, batch_idx)
            self._module_hook(outputs, batch, batch_idx)
        self._late.end_step()
        if self._schedule.count(at):
            for average in self._averages:
                average.end_epoch(trainer, pl_module)
            if not last:
                # Lightning steps schedules by epoch after the last batch only, which belongs to the last shard.
                trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        if at.averaging or (last and every is not None and (epoch + 1) % every == 0):
            self._average(self.engine)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the options of the optimizers, which hooks behind this one may change."""
        if self.engine is not None:
            self._options = self.engine.options()

    def _take_in(self, engine: ShardEngine, module: LightningModule) -> None:
        """Give to all shards what hooks at the start of the epoch changed: what trains, and with which options."""
        if self._options is not None:  # else the run was taken up in mid-epoch, behind these hooks
            engine.share_options(self._options)
        names = engine.extend(module)
        if not names:
            return
        if self.groups.within is not None:
            raise MisconfigurationException(
                f"ParameterAveragingCallback expected what trains to stay the same where several processes train one "
                f"shard, but got '{names[0]}' unfrozen: DDP does not reduce its gradients. Use at most "
                f"{self._shards} processes, or unfreeze it before training."
            )
        self._frozen = FrozenWatch(module, engine.own_tensors)
        rank_zero_info(f"Shards: {len(names)} more tensors train from epoch {self._epoch} on, '{names[0]}' the first.")

    def _average(self, engine: ShardEngine) -> None:
        self._frozen.check()
        for shard, distance in zip(engine.states, engine.average(), strict=True):
            self._log.add("distance", shard, distance)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log each shard's values of this epoch."""
        if self.engine is not None:
            self._log.flush(trainer)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all shards of the run, gathered on the first process. Lightning calls it on every process."""
        if self.engine is None:
            return {}
        world_size = self.engine.trainer.world_size
        states = {} if self.groups.replica else self.engine.state_dict()  # replicas of a shard are alike
        return {
            "identity": self._identity(),
            "seed": self.seed,
            **({"trains": self._trains(self.engine)} if self.engine.is_extended else {}),
            **self._schedule.record(world_size),
            "agreed": self.engine.agreed,
            "whole": not self.engine.is_averaging,
            "max_epochs": self.engine.trainer.max_epochs,
            "log": self._log.state_dict(self.engine.trainer),
            "shards": gather_shards(states, world_size),
        }

    def _trains(self, engine: ShardEngine) -> tuple[list[str], list[str]]:
        """Names of what has trained at any time, and of what trains now."""
        now = [name for name, p in engine.trainer.lightning_module.named_parameters() if p.requires_grad]
        return sorted(engine.trained), now

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a run that was stopped within an epoch take the rest of it: shards that come last have yet to train."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        if not saved or "loops" not in checkpoint:
            return
        is_ours = isinstance(getattr(trainer, "datamodule", None), ShardedDataModule)
        if is_ours and saved["done"] and not took_last_batch(checkpoint) and next_epoch(checkpoint) > saved["epoch"]:
            reopen_epoch(checkpoint)
        self._skips_epoch_end = skips_epoch_end(checkpoint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what :meth:`state_dict` returned until the model and the optimizers are there."""
        self._saved = state_dict

    def _identity(self) -> dict[str, Any]:
        """Return what must not change when a run is resumed."""
        assert self.engine is not None  # noqa: S101
        return {
            "number of shards": self._shards,
            "shard weights": self.engine.sizes,
            "steps of each shard in an epoch": self._sampler.steps,
            "length of a round": f"{self.every_n_epochs} epochs, {self.every_n_train_steps} steps",
            **self._sampler.identity,
            "model": self.engine.layout.shapes,
        }

    def _resume(self, trainer: Trainer, module: LightningModule, engine: ShardEngine) -> None:
        """Restore the shards of a checkpoint of the same run; without shards, continue from its weights."""
        # Data of its own on each process continue where the user's loader does.
        is_ours = isinstance(self._sampler, ShardSampler)
        if not self._saved:
            log.warning("The checkpoint holds no shards: its weights and optimizer are where all shards start from.")
            if trainer.fit_loop.restarted_mid_epoch and is_ours:
                _set_position(trainer, 0)  # its epoch had other batches
            return
        if not self._saved["whole"]:
            raise MisconfigurationException(
                f"Argument `ckpt_path` expected a whole checkpoint, but got '{trainer.ckpt_path}', written in "
                "the middle of an averaging that an error broke off. Use the one before it."
            )
        if trains := self._saved.get("trains"):
            engine.extend_as(module, list(self._saved["identity"]["model"]), *trains)
        check_same_run(self._saved["identity"], self._identity())
        if trainer.is_global_zero:
            self._warn_of_another_length(trainer.max_epochs)
        engine.load_state_dict(self._saved.pop("shards"), agreed=self._saved["agreed"])
        self._log.load_state_dict(self._saved["log"], trainer)
        if self._skips_epoch_end:
            self._log.end_epoch(trainer, epoch=trainer.current_epoch - 1)
        if is_ours:
            _set_position(trainer, self._schedule.batches_before())
        # Lightning warns of batches that are None; here they are how a process waits for others.
        warnings.filterwarnings("ignore", message=".*yielded None.*")

    def _warn_of_another_length(self, epochs: int | None) -> None:
        """Warn in one line where a run that goes on averages more or less often than that of the checkpoint."""
        every, before = self.every_n_epochs, self._saved.get("max_epochs")
        if every is None or not before or not epochs or min(before, epochs) < 0:
            return
        then, now = (math.ceil(length / every) for length in (before, epochs))
        if then != now:
            log.warning(
                "The shards are averaged every %d epochs and at the end: %s in this run of %d epochs, but %s in the "
                "one that wrote the checkpoint, of %d.",
                every, counted(now, "time"), epochs, counted(then, "time"), before,
            )  # fmt: skip

    def _saving(self, engine: ShardEngine, module: LightningModule, own: _Saving) -> _Saving:
        """Return the module's ``on_save_checkpoint``, which saves averages, in files of weights alone too."""

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            is_full = "current_model_state" in checkpoint  # of Lightning's WeightAveraging, in full checkpoints only
            with engine.average_shown():
                checkpoint["state_dict"] = _cloned(module.state_dict())
                own(checkpoint)
                if is_full:
                    for average in self._averages:
                        average.callback.on_save_checkpoint(engine.trainer, module, checkpoint)
                    for part in ("state_dict", "averaging_state"):
                        checkpoint[part] = _cloned(checkpoint[part])

        return on_save_checkpoint

    # --- everything else sees the average ----------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average, in mid-round too; the next training step puts the active shard back."""
        if self.engine is not None:
            self.engine.show_average()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average as the result of the run, wherever in a round it ended."""
        if self.engine is not None and not self.engine.agreed:
            self._average(self.engine)
            self._log.flush(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave an ordinary model."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """With several processes, leave an ordinary model at once: the others may not be there for an average.

        A checkpoint that another callback would now write would wait for the others, or lack their shards; it is not
        written. One process keeps its shards until the other callbacks have written their last checkpoints.
        """
        if trainer.world_size > 1 and self.engine is not None:
            self._release()
            self._stack.enter_context(patched_attribute(trainer, "save_checkpoint", _write_no_checkpoint))

    def _release(self) -> None:
        self._stack.close()
        if self.engine is not None:
            self.engine.release()
            self.engine = None
            self.__dict__.pop("_late", None)
            # What comes after must not depend on the process count, as the last step's seed does.
            seed_rng(derive_seed(self.seed, 1))


class _ReleaseAfterException(Callback):
    """Leaves an ordinary model and strategy after an exception, when all other callbacks have seen it."""

    position = Position.RELEASE

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        averaging = find_callback(trainer, ParameterAveragingCallback)
        if averaging is not None:
            averaging.teardown(trainer, pl_module, "fit")


def _write_no_checkpoint(filepath: Any, *args: Any, **kwargs: Any) -> None:
    log.warning("No checkpoint '%s' after an exception in one of several processes: the last one counts.", filepath)


def _cloned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors: a view of the flat tensor would be saved with all of it."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _set_position(trainer: Trainer, position: int) -> None:
    """Tell Lightning's loop how many of this process's batches of the epoch are done.

    Its own count is that of the process that wrote the checkpoint, in a run of perhaps other processes. A batch that
    was not yet complete in the checkpoint (which may be written before it counts as completed) remains so.
    """
    current = trainer.fit_loop.epoch_loop.batch_progress.current
    shift = position - current.ready
    for name in ("ready", "started", "processed", "completed"):
        setattr(current, name, getattr(current, name) + shift)


def _count_step_of_others(trainer: Trainer, batch_idx: int) -> None:
    """Let a process that waits count the steps that others take: callbacks save and log by ``global_step``.

    Lightning does not count the batch None as begun; a run that goes on would not know its last batch as complete.
    """
    trainer.fit_loop.epoch_loop.batch_progress.increment_started()
    if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
        step = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        step.increment_ready()
        step.increment_completed()


# Distances a few times the first are usual while a learning rate warms up; ten times *(our choice)* are not.
TOO_FAR = 10.0


def diverges(distances: list[float], reference: float) -> bool:
    """Whether shard models are so far from one another, beside the first averaging, that their average means little.

    Example:
        >>> diverges([0.1, 0.2], reference=0.1), diverges([0.1, 1.1], reference=0.1), diverges([math.nan], 0.1)
        (False, True, True)
    """
    return any(not math.isfinite(distance) or distance > TOO_FAR * reference for distance in distances)


class ShardLog:
    """Sums values by shard, on the device, and logs their means over all processes at the end of each epoch.

    Names are as :class:`ParameterAveragingCallback` tells them.
    """

    names = ("loss", "skip_rate", "distance")

    def __init__(self, num_shards: int, device: torch.device) -> None:
        # Sums, and numbers of values, by name and shard.
        self.sums = torch.zeros(2, len(self.names), num_shards, dtype=torch.float32, device=device)
        self.reference: float | None = None
        self._has_warned = False

    def add(self, name: str, shard: int, value: Tensor) -> None:
        """Add a value of a shard; the host does not wait for the device."""
        row = self.names.index(name)
        self.sums[0, row, shard] += value.detach().to(self.sums.device).float().mean()
        self.sums[1, row, shard] += 1

    def add_step(self, trainer: Trainer, shard: int, outputs: Any) -> None:
        """Add the loss of a training step, and the skip rate where a callback has one."""
        loss = loss_of(outputs, trainer.accumulate_grad_batches)
        if loss is not None:
            self.add("loss", shard, loss)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            rate = getattr(callback, "last_skip_rate", None)
            if isinstance(rate, Tensor):
                self.add("skip_rate", shard, rate)

    def flush(self, trainer: Trainer) -> None:
        """Log the means of the epoch, and warn when shards diverge. A collective."""
        log_values(trainer, self.end_epoch(trainer, epoch=trainer.current_epoch, keep=is_cut_short(trainer)))

    def end_epoch(self, trainer: Trainer, *, epoch: int, keep: bool = False) -> dict[str, float]:
        """Return the means of an epoch by name, begin the next one, and warn when shards diverge. A collective.

        With ``keep``, the epoch may be continued from a checkpoint, and its sums stay.
        """
        total = trainer.strategy.reduce(self.sums.clone(), reduce_op="sum")
        assert isinstance(total, Tensor)  # noqa: S101
        if not keep:
            self.sums.zero_()
        values: dict[str, list[float]] = dict(zip(self.names, (total[0] / total[1]).tolist(), strict=True))
        seen = total[1].bool().tolist()
        metrics: dict[str, float] = {
            f"shard_{shard}/{name}": value
            for name, known in zip(self.names, seen, strict=True)
            for shard, value in enumerate(values[name])
            if known[shard]
        }
        if "shard_0/distance" not in metrics:
            return metrics
        distances = values["distance"]
        if not self.reference:  # none yet, or 0: a learning rate that starts there
            self.reference = sum(distances) / len(distances)
        elif diverges(distances, self.reference) and not self._has_warned:
            self._has_warned = True
            log.warning(
                "Shard models diverge: at the averaging of epoch %d they were up to %.3g of its norm away from the "
                "average, at the first one %.3g. Average more often, or use a smaller learning rate.",
                epoch + 1, max(distances), self.reference,
            )  # fmt: skip
        return metrics

    def state_dict(self, trainer: Trainer) -> dict[str, Any]:
        """Return the epoch so far, over all processes. A collective."""
        total = trainer.strategy.reduce(self.sums.clone(), reduce_op="sum")
        return {"sums": total.cpu(), "reference": self.reference}

    def load_state_dict(self, state: dict[str, Any], trainer: Trainer) -> None:
        """Continue an epoch; its sums count once, on the first process."""
        self.reference = state["reference"]
        if trainer.is_global_zero:
            self.sums.copy_(state["sums"])
