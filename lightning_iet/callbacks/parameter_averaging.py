"""Iterative ensemble training: shard models that train alone and are averaged now and then."""

import logging
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy

from lightning_iet.data.shard_sampler import ShardPlan, ShardSampler
from lightning_iet.data.sharding import ShardedDataModule
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.functional.sharding import ShardStep, hosted_shards
from lightning_iet.shards import ShardEngine
from lightning_iet.shards.own_data import own_shard
from lightning_iet.shards.run_record import check_same_everywhere, check_same_run, gather_shards, set_position
from lightning_iet.utilities.checks import check_schedulers, check_trainer
from lightning_iet.utilities.random import seed_rng
from lightning_iet.utilities.shadow import shadowed

__all__ = ["ParameterAveragingCallback"]

log = logging.getLogger(__name__)


class ParameterAveragingCallback(pl.Callback):
    r"""Trains K shard models, each on its own shard only, and averages them at intervals.

    .. math:: \theta \leftarrow \sum_k (n_k / n)\, \theta_k

    for trainable parameters, EMA weights and floating buffers; every shard continues from the average, with its own
    optimizer moments, learning-rate schedule and loss bank. Source: Liu et al., *Iterative Ensemble Training with
    Anti-Gradient Control for Mitigating Memorization in Diffusion Models*, ECCV 2024, https://arxiv.org/abs/2407.15328.

    Shards are not processes: K shards run on W processes for any W that divides K (W = 1 included), with the same
    final weights (bit for bit on one kind of CPU in float32, with equally many threads in each process). An epoch is
    one pass over all the data; a process walks through its shards one after the other.
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
            raise ValueError("Arguments `every_n_epochs` and `every_n_train_steps` expected one of them, but got both.")
        if weighting not in ("samples", "uniform"):
            raise ValueError(f"Argument `weighting` expected 'samples' or 'uniform', but got {weighting!r}.")
        self.num_shards = num_shards
        self.every_n_epochs = every_n_epochs if every_n_train_steps is not None else (every_n_epochs or 1)
        self.every_n_train_steps = every_n_train_steps
        self.weighting = weighting
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
        others = [callback for callback in others if not isinstance(callback, _Closing)]
        trainer.callbacks = [self, *others, _Closing(self)]  # type: ignore[attr-defined]
        self._saved = {}
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
        if (self.every_n_train_steps or 0) % trainer.accumulate_grad_batches:
            raise MisconfigurationException(
                f"Argument `every_n_train_steps` expected a multiple of accumulate_grad_batches "
                f"({trainer.accumulate_grad_batches}), but got {self.every_n_train_steps}: gradients would be summed "
                "over two shards."
            )
        hosted_shards(shards, trainer.world_size, trainer.global_rank)
        if in_data is None and shards != trainer.world_size:
            raise MisconfigurationException(
                f"ParameterAveragingCallback expected data split into {shards} shards, but the run has "
                f"{trainer.world_size} process(es) and no ShardedDataModule. Wrap the data module: "
                f"ShardedDataModule(datamodule, num_shards={shards})."
            )
        if isinstance(datamodule, ShardedDataModule):
            self.seed = 0
            datamodule.plan = self._plan(trainer)
            datamodule.train_dataloader()  # a split that cannot be made is refused before anything is written

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
            limit=_limit_per_shard(trainer, shards // trainer.world_size),
            epoch=self._saved.get("epoch", 0),
            done=tuple(self._saved.get("done", ())),
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the shards from the common starting weights, and stop gradients from crossing between processes."""
        shards = self._shards(trainer)
        if shards == 1:
            return
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        self._sampler = sampler if isinstance(sampler, ShardSampler) else own_shard(trainer, self.every_n_train_steps)
        check_schedulers(trainer)
        self.engine = ShardEngine(
            trainer,
            pl_module,
            hosted=self._sampler.hosted,
            sizes=self._sampler.sizes if self.weighting == "samples" else [1.0] * shards,
            group=dist.group.WORLD if trainer.world_size > 1 else None,
        )
        self._epoch, self._done = -1, dict.fromkeys(self._sampler.hosted, 0)
        check_same_everywhere(self._identity(), trainer.world_size)
        if trainer.ckpt_path is not None:
            self._resume(trainer)
        if isinstance(trainer.strategy, ParallelStrategy):
            self._stack.enter_context(trainer.strategy.block_backward_sync())
            # DDP would still broadcast buffers before the first forward: from one shard's into all others'.
            self._stack.enter_context(shadowed(trainer.strategy.model, "require_forward_param_sync", False))
        self._stack.enter_context(shadowed(pl_module, "on_save_checkpoint", self._averaged(pl_module)))

    # --- training --------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Turn to the shard whose batch this is, and seed its step."""
        if self.engine is None:
            return
        at = self._at(trainer, batch_idx)
        assert at.shard is not None  # noqa: S101 (Lightning calls no hook for the batch None)
        self.engine.activate(at.shard)
        self.engine.agreed = False
        seed_rng(derive_seed(self.seed, at.shard, trainer.current_epoch, at.step))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average at the end of a round: here, because validation at the end of an epoch comes next."""
        if self.engine is None:
            return
        at, last = self._at(trainer, batch_idx), batch_idx + 1 == len(self._sampler)
        if at.shard is not None:
            self._done[at.shard] = at.step + 1
            if at.step + 1 == self._sampler.steps and not last:
                # Lightning steps schedules by epoch after the last batch only, which belongs to the last shard.
                trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        epochs = self.every_n_epochs
        if at.averaging or (last and epochs is not None and (trainer.current_epoch + 1) % epochs == 0):
            self.engine.average()

    def _at(self, trainer: Trainer, batch_idx: int) -> ShardStep:
        """Whose step a batch of this epoch is."""
        if trainer.current_epoch != self._epoch:
            self._epoch = trainer.current_epoch
            self._walk = self._sampler.walk(self._epoch)
            resumed = self._epoch == self._saved.get("epoch") and bool(self._saved.get("done"))
            self._done = {shard: self._saved["done"][shard] if resumed else 0 for shard in self._done}
        # A resumed epoch holds what is left of it: the last batches.
        return self._walk[batch_idx - len(self._sampler) + len(self._walk)]

    def describe(self, trainer: Trainer) -> str:
        """Where the run is, in words, such as ``epoch 12/40, round 2/4, 4 shards``."""
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs
        parts = [f"epoch {epoch}/{epochs}" if epochs and epochs > 0 else f"epoch {epoch}"]
        if self.engine is not None:
            if self.every_n_epochs is not None and epochs and epochs > 0:
                parts.append(f"round {-(-epoch // self.every_n_epochs)}/{-(-epochs // self.every_n_epochs)}")
            parts.append(f"{len(self.engine.sizes)} shards")
        return ", ".join(parts)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All shards of the run, gathered on the first process. Lightning calls it on every process."""
        if self.engine is None:
            return {}
        world_size = self.engine.trainer.world_size
        everyone: list[Any] = [self._done]
        if world_size > 1:
            everyone = [None] * world_size
            dist.all_gather_object(everyone, self._done)
        done = [steps for part in everyone for _, steps in sorted(part.items())]
        finished = set(done) == {self._sampler.steps}
        return {
            "identity": self._identity(),
            "seed": self.seed,
            "epoch": max(self._epoch, 0) + finished,
            "done": [] if finished else done,
            "agreed": self.engine.agreed,
            "shards": gather_shards(self.engine.state_dict(), world_size),
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
            "steps of each shard in an epoch": self._sampler.steps,
            "length of a round": f"{self.every_n_epochs} epochs, {self.every_n_train_steps} steps",
            **self._sampler.identity,
            "model": self.engine.layout.shapes,
        }

    def _resume(self, trainer: Trainer) -> None:
        assert self.engine is not None  # noqa: S101
        if not self._saved:
            log.warning("The checkpoint holds no shards: its weights and optimizer are where all shards start from.")
            return
        check_same_run(self._saved["identity"], self._identity())
        self.engine.load_state_dict(self._saved.pop("shards"), agreed=self._saved["agreed"])
        if isinstance(self._sampler, ShardSampler):  # data of its own go on where the user's loader does
            left = len(self._sampler.walk(self._saved["epoch"])) if self._saved["done"] else 0
            set_position(trainer, len(self._sampler) - left)
        # Lightning warns of batches that are None; here they are how a process waits for others.
        warnings.filterwarnings("ignore", message=".*yielded None.*")

    def _averaged(self, module: LightningModule) -> Callable[[dict[str, Any]], None]:
        """The module's ``on_save_checkpoint``, called for full checkpoints and for weights alone, with the average."""
        own = module.on_save_checkpoint

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            assert self.engine is not None  # noqa: S101
            self.engine.show_average()
            try:
                # Copies: a view of the flat tensor would be saved with all of it.
                checkpoint["state_dict"] = {name: tensor.clone() for name, tensor in module.state_dict().items()}
                own(checkpoint)
            finally:
                self.engine.hide_average()

        return on_save_checkpoint

    # --- whatever looks at the model sees the average ----------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average, in mid-round too; the next training step puts the shard at work back."""
        if self.engine is not None:
            self.engine.show_average()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The result of the run is the average, wherever in a round it ended."""
        if self.engine is not None and not self.engine.agreed:
            self.engine.average()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave an ordinary model."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """With several processes, leave an ordinary model at once: the others may not be there for an average.

        One process keeps its shards until the other callbacks have written their last checkpoints.
        """
        if trainer.world_size > 1:
            self._release()

    def _release(self) -> None:
        self._stack.close()
        if self.engine is not None:
            self.engine.hide_average()
            self.engine.release()
            self.engine = None


class _Closing(pl.Callback):
    """Last in line: ends the averaging after an exception, when all others have seen it."""

    def __init__(self, averaging: ParameterAveragingCallback) -> None:
        self.averaging = averaging

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave an ordinary model and an ordinary strategy."""
        self.averaging.teardown(trainer, pl_module, "fit")


def _limit_per_shard(trainer: Trainer, hosted: int) -> int | None:
    """Steps that `limit_train_batches`, a limit on the batches of a process, leaves to each of its shards."""
    limit, least = trainer.limit_train_batches, hosted * trainer.accumulate_grad_batches
    if isinstance(limit, int) and (limit >= least or trainer.fast_dev_run):  # type: ignore[attr-defined]
        return max(limit // hosted, 1)
    if isinstance(limit, int):
        raise MisconfigurationException(
            f"ParameterAveragingCallback expected limit_train_batches to leave a step to each of the {hosted} shards "
            f"of a process, at least {least}, but got {limit}. Use a larger limit, or fewer shards."
        )
    if limit == 1.0:
        return None
    raise MisconfigurationException(
        f"ParameterAveragingCallback expected limit_train_batches as a number of batches, but got the share {limit}. "
        "Use an integer."
    )
