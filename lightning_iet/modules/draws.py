"""What a module of ours draws: timesteps, noise, labels that are dropped."""

import lightning.pytorch as pl
import torch

from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.random import seed_rng

__all__ = ["DrawsAfresh"]


class DrawsAfresh:
    """Mixed into a LightningModule: every process draws its own numbers, and a resumed run new ones.

    Lightning seeds all processes alike, so that under plain DDP all would draw the same timesteps and the same noise
    for their different images; and it does not keep the state of generators, so that a run that is resumed again and
    again would train on the same draws for ever. The first process of a new run is left as it was seeded. Under shards
    every step is seeded anyway.
    """

    def on_train_start(self) -> None:
        """Seed from (seed of the run, rank, steps so far)."""
        trainer: pl.Trainer = self.trainer  # type: ignore[attr-defined]
        if trainer.global_rank or trainer.global_step:
            seed_rng(derive_seed(torch.initial_seed() % 2**63, trainer.global_rank, trainer.global_step))
