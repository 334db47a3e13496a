"""What a loss bank of unseen images needs: when they are measured, on whose behalf, and from where they come."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_iet.callbacks.seams import Seam
from lightning_iet.callbacks.unseen_images import Reference, UnseenImages, held_out_images, other_shards
from lightning_iet.callbacks.unseen_losses import UnseenLosses, check_readable
from lightning_iet.data.shard_sampler import ShardSampler
from lightning_iet.functional.seeding import derive_seed

__all__ = ["Anchor"]

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
