"""Runs on shards of digits that save on their way, and go on from there."""

import warnings

import lightning.pytorch as pl
import torch

from lightning_iet import DigitsDataModule, ShardedDataModule
from tests.helpers.models import quiet_trainer, tiny_diffusion

SEED = 3


class Saves(pl.callbacks.Checkpoint):
    """Saves after each step (``EPOCH-STEP.ckpt``), validation (``EPOCH-validated``), epoch (``EPOCH-end``), or some."""

    def __init__(self, folder, names=None):
        self.folder, self.names = folder, names

    def save(self, trainer, name):
        if self.names is None or name in self.names:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, f"{trainer.current_epoch}-{batch_idx}")

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.save(trainer, f"{trainer.current_epoch}-validated")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, f"{trainer.current_epoch}-end")


def train_on_shards(
    folder,
    callbacks,
    num_train,
    num_shards,
    *,
    batch_size,
    epochs,
    world_size=1,
    ckpt_path=None,
    saves=None,
    limit_val_batches=0,
):
    """Train a model with dropout, one of ``world_size`` processes; returns it and its trainer."""
    torch.manual_seed(SEED)
    module = tiny_diffusion(unet={"dropout": 0.1, "mid_block_type": None})
    trainer = quiet_trainer(
        folder,
        callbacks=[*callbacks, *([saves] if saves else [])],
        max_epochs=epochs,
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        limit_val_batches=limit_val_batches,
        enable_checkpointing=saves is not None,
    )
    data = ShardedDataModule(DigitsDataModule(num_train, batch_size=batch_size), num_shards, partition="iid")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*yielded None.*")
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module, trainer
