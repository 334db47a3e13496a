"""What a run will cost, before it starts: ``lightning-iet plan`` takes the options of ``fit``."""

import resource
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import rich
import torch

from lightning_iet.callbacks.anti_gradient_control import AntiGradientControl
from lightning_iet.callbacks.parameter_averaging import ParameterAveragingCallback
from lightning_iet.data.shard_sampler import ShardPlan, ShardSampler
from lightning_iet.data.sharding import ShardedDataModule
from lightning_iet.tools.cost import Cost, Schedule, cost_table, model_size
from lightning_iet.utilities.checks import check_trainer, limit_per_shard

__all__ = ["PlanningTrainer"]


class PlanningTrainer(pl.Trainer):
    """A trainer that can also say what training will cost."""

    def plan(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: Path | None = None,
        weights_only: bool | None = None,
        measure_steps: int = 0,
    ) -> Cost:
        """Prints what a run will cost before it starts: steps, memory, bytes averaged, time.

        Nothing is written. The data are set up, for their number; the model is built.

        Args:
            model: What would be trained.
            datamodule: Where the samples come from.
            ckpt_path: Of no effect: whatever a configuration of ``fit`` may hold is taken.
            weights_only: Likewise.
            measure_steps: Take so many steps, and two before them, for an estimate of the time; 0 = none.

        Returns:
            The cost.

        Raises:
            ValueError: If there is no data module, or steps are to be measured on several processes.
        """
        if datamodule is None:
            raise ValueError("Argument `data` expected a data module to plan with, but got none. Give one as --data.")
        if measure_steps < 0 or (measure_steps and self.world_size > 1):
            raise ValueError(
                f"Argument `measure_steps` expected an integer ≥ 0, and 0 for {self.world_size} processes, but got "
                f"{measure_steps}. Measure on one process (--trainer.devices 1)."
            )
        averaging = _averaging(self)
        if averaging is not None and averaging.num_shards != 1:
            check_trainer(self, model, round_steps=averaging.every_n_train_steps)  # what would not run has no price
        datamodule.prepare_data()
        datamodule.setup("fit")
        cost = Cost(model_size(model), schedule_of(self, datamodule), device=str(self.strategy.root_device))
        if measure_steps:
            cost = _measured(self, model, datamodule, cost, steps=measure_steps)
        rich.get_console().print(cost_table(cost))
        if getattr(getattr(datamodule, "datamodule", datamodule), "synthetic", False):
            rich.get_console().print("The data are synthetic: steps, shards and time are those of a few random images.")
        return cost


def schedule_of(trainer: pl.Trainer, datamodule: pl.LightningDataModule) -> Schedule:
    """How long a run of a trainer is.

    Args:
        trainer: Not started.
        datamodule: Set up.
    """
    averaging = _averaging(trainer)
    epochs = 1000 if trainer.max_epochs is None and trainer.max_steps == -1 else trainer.max_epochs  # Lightning's own
    return Schedule(
        *_steps(trainer, datamodule, averaging),
        epochs=None if epochs in (None, -1) else epochs,
        max_steps=None if trainer.max_steps == -1 else trainer.max_steps,
        round_epochs=None if averaging is None else averaging.every_n_epochs,
        round_steps=None if averaging is None else averaging.every_n_train_steps,
    )


def _averaging(trainer: pl.Trainer) -> ParameterAveragingCallback | None:
    return next((c for c in trainer.callbacks if isinstance(c, ParameterAveragingCallback)), None)  # type: ignore[attr-defined]


def _steps(
    trainer: pl.Trainer, datamodule: pl.LightningDataModule, averaging: ParameterAveragingCallback | None
) -> tuple[tuple[int, ...], int, int]:
    """Sizes of the shards, number of processes, optimizer steps of each shard in an epoch."""
    processes, accumulated = trainer.world_size, trainer.accumulate_grad_batches
    if isinstance(datamodule, ShardedDataModule) and datamodule.num_shards > 1:
        datamodule.plan = ShardPlan(
            num_shards=datamodule.num_shards,
            num_processes=processes,
            round_steps=None if averaging is None else averaging.every_n_train_steps,
            multiple_of=accumulated,
            limit=limit_per_shard(trainer, datamodule.num_shards),
        )
        sampler = datamodule.train_dataloader().sampler
        assert isinstance(sampler, ShardSampler)  # noqa: S101 (what a sharded loader has)
        return tuple(len(shard) for shard in sampler.shards), processes, sampler.steps // accumulated
    loader: Any = datamodule.train_dataloader()
    batches, limit = -(-len(loader) // processes), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return (len(loader.dataset),), processes, -(-batches // accumulated)


# --- measuring --------------------------------------------------------------------------------------------------------


class _Clock(pl.Callback):
    """Takes the time from the end of a batch to that of the next: waiting for data is in it. Then ends the training."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.ends.append(time.perf_counter())
        trainer.should_stop = len(self.ends) >= self.batches


def _measured(
    trainer: pl.Trainer, model: pl.LightningModule, datamodule: pl.LightningDataModule, cost: Cost, *, steps: int
) -> Cost:
    """Train for a few steps of the first shard, as the run would begin; nothing but the methods is called."""
    accumulated = trainer.accumulate_grad_batches
    clock = _Clock((steps + 2) * accumulated)
    methods = (AntiGradientControl, ParameterAveragingCallback)
    trainer.callbacks = [*(c for c in trainer.callbacks if isinstance(c, methods)), clock]  # type: ignore[attr-defined]
    trainer.loggers = []
    trainer.limit_val_batches = trainer.num_sanity_val_steps = 0
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = -1, -1
    trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
    if cost.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(model, datamodule=datamodule)
    # The first two steps make room, and compile.
    spans = [end - start for start, end in pairwise(clock.ends[2 * accumulated - 1 :])]
    if cost.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = statistics.median(spans) * accumulated
    return Cost(cost.size, cost.schedule, step_seconds=seconds, peak=peak, device=cost.device)
