"""One run: from a row, a setting and a seed to checkpoints at the marks, resumable at any epoch."""

import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import DDPMScheduler

from benchmarks.mitigation.data import Sets
from benchmarks.mitigation.denoiser import make_denoiser
from benchmarks.mitigation.rows import Row
from benchmarks.mitigation.settings import Setting
from lightning_iet import (
    AntiGradientControl,
    DiffusionModule,
    ParameterAveragingCallback,
    Redistribution,
    ShardedDataModule,
    ThresholdAwareAugmentation,
)
from lightning_iet.utilities.files import write_atomically

LAST = "last.ckpt"
COST = "cost.json"
SAVE_EVERY = 120  # seconds: what a run that is cut off can lose


Cost = dict[int, dict[str, float]]
"""Steps, seconds and share of samples skipped, by mark."""


class OutOfTime(Exception):
    """The slice is over; the run goes on in the next one."""


class Marks(pl.Callback):
    """Saves the weights at each mark, with what training has cost until then; stops at a deadline.

    Args:
        folder: for the checkpoints, ``00750.ckpt`` and so on, and for the run's state.
        steps: the marks; training ends at the last one.
        deadline: by ``time.time()``; ``None`` = there is none.

    Attributes:
        cost: seconds of the processor (of the wall clock, on an accelerator), and share of samples skipped, by mark.
    """

    def __init__(self, folder: Path, steps: list[int], *, deadline: float | None) -> None:
        self.folder = folder
        self.steps = sorted(set(steps))
        self.deadline = deadline
        self.cost: Cost = {}
        self.spent = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.clock = time.process_time if pl_module.device.type == "cpu" else time.monotonic
        self.started, self.saved = self.clock(), time.time()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if a mark has been reached; the first epoch at or behind it counts."""
        now = self.clock()
        self.spent += now - self.started
        for mark in [mark for mark in self.steps if mark not in self.cost and trainer.global_step >= mark]:
            agc = next((c for c in trainer.callbacks if isinstance(c, AntiGradientControl)), None)
            skipped = float(agc.skip_rate()) if agc is not None else 0.0
            self.cost[mark] = {"steps": trainer.global_step, "seconds": self.spent, "skip_rate": skipped}
            trainer.save_checkpoint(self.folder / f"{mark:05d}.ckpt", weights_only=True)
        is_over = self.deadline is not None and time.time() > self.deadline
        if is_over or time.time() - self.saved > SAVE_EVERY:
            trainer.save_checkpoint(self.folder / LAST)
            self.saved = time.time()
        trainer.should_stop = self.is_finished or is_over
        self.started = self.clock()

    @property
    def is_finished(self) -> bool:
        """Whether the last mark has been reached."""
        return self.steps[-1] in self.cost

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"cost": self.cost, "spent": self.spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self.cost, self.spent = dict(state_dict["cost"]), state_dict["spent"]


def make_module(setting: Setting, row: Row, *, seed: int) -> DiffusionModule:
    """The model, with initial weights that depend on the seed alone."""
    pl.seed_everything(seed, verbose=False)
    return DiffusionModule(
        make_denoiser(setting, row),
        scheduler=DDPMScheduler(beta_schedule=setting.schedule, prediction_type=setting.prediction),
        ema_decay=setting.ema_decay,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=setting.learning_rate, fused=True),
        warmup_steps=max(1, setting.warmup // row.num_shards),
    )


def train(setting: Setting, row: Row, seed: int, folder: Path, *, deadline: float | None, device: str) -> Cost:
    """Train, leaving a checkpoint in ``folder`` at each mark; what has been trained is not trained again.

    Returns:
        What training had cost at each mark.

    Raises:
        OutOfTime: if the deadline came first; called again, it goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / COST).exists():
        return {int(mark): cost for mark, cost in json.loads((folder / COST).read_text()).items()}
    steps = setting.marks(dense=row.is_plain, times_as_long=row.times_as_long)
    marks = Marks(folder, steps, deadline=deadline)
    trainer = quiet_trainer(
        accelerator=device,
        precision=setting.precision if device != "cpu" else "32-true",
        max_epochs=steps[-1],  # more than enough: the last mark ends it
        callbacks=[*_methods(setting, row), marks],
        default_root_dir=folder,
    )
    last = folder / LAST
    module = make_module(setting, row, seed=seed)
    data: pl.LightningDataModule = Sets(setting, row, seed=seed)
    if row.num_shards > 1:
        # Five images of a class cannot be dealt to ten shards, so no row of shards is stratified.
        data = ShardedDataModule(data, row.num_shards, partition="iid", seed=seed)
    trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None, weights_only=last.exists() or None)
    if not marks.is_finished:
        raise OutOfTime
    with write_atomically(folder / COST) as path:
        path.write_text(json.dumps(marks.cost))
    return marks.cost


def quiet_trainer(*, accelerator: str = "cpu", **options: Any) -> pl.Trainer:
    """A Trainer on one device that only trains: no validation, and no checkpoint, log or line of its own."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return pl.Trainer(
        accelerator=accelerator,
        devices=1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        **dict.fromkeys(quiet, False),
        **options,
    )


def _methods(setting: Setting, row: Row) -> list[pl.Callback]:
    callbacks: list[pl.Callback] = []
    if row.threshold:
        anchored = row.reference != "train"
        every = {"reference_every": row.reference_every} if row.reference_every else {}
        bins = None if anchored or row.agc else setting.num_bins
        options = every | dict(row.agc)
        callbacks.append(AntiGradientControl(row.threshold, reference=row.reference, num_bins=bins, **options))
    if row.num_shards > 1:
        rounds = row.round_epochs or setting.round_epochs
        callbacks.append(ParameterAveragingCallback(row.num_shards, every_n_epochs=rounds))
    if row.exchange:
        callbacks.append(Redistribution(choose=row.exchange))
    if row.max_magnitude:
        callbacks.append(ThresholdAwareAugmentation(row.max_magnitude))
    return callbacks


def silence() -> None:
    """One line for each run is enough."""
    for name in ("lightning", "lightning.pytorch", "lightning_iet", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
