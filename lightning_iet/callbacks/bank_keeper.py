"""The loss bank at work: it judges batches, learns from them or from unseen images, and belongs to a shard."""

from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from lightning_iet.callbacks.anchor import Anchor
from lightning_iet.callbacks.seams import Selection
from lightning_iet.callbacks.skip_statistics import SkipReaders
from lightning_iet.callbacks.timestep_bins import TimestepBins
from lightning_iet.functional.anti_gradient import check_batch, keep_mask, update_anchored_bank, update_bank
from lightning_iet.utilities.replicas import gather_rows

__all__ = ["BankKeeper"]


class BankKeeper(SkipReaders):
    """The part of :class:`~lightning_iet.callbacks.AntiGradientControl` that has to do with its bank."""

    threshold: float
    decay: float
    normalize: Literal["kept", "batch"]
    bank: Tensor
    bins: TimestepBins
    shard: int | None = None
    last_skip_rate: Tensor | None = None
    _anchor: Anchor
    _is_first_batch: bool
    _batch_size: int = 0
    _replicas: dist.ProcessGroup | None = None

    def state_dict(self) -> dict[str, Any]:
        """Bank, bins and statistics; of several processes, the one that writes the checkpoint saves its own."""
        others = {"continuous": self.bins.continuous} | self._anchor.state_dict()
        return self.shard_state() | others | self._statistics.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; ValueError if it was saved with another number of bins."""
        self._anchor.load_state_dict(state_dict)
        names = self.shard_state().keys()
        self.load_shard_state({name: state_dict[name].to(self.bank.device, copy=True) for name in names})
        self.bins.continuous = state_dict["continuous"]
        self._statistics.load_state_dict(state_dict)

    def shard_state(self) -> dict[str, Tensor]:
        """References to the tensors in which shards differ: the bank and the bins. They are updated in place."""
        return {"bank": self.bank} | self.bins.shard_state() | self._anchor.shard_state()

    def load_shard_state(self, state: dict[str, Tensor]) -> None:
        """Put the tensors of another shard in place, by reference; ValueError if their number of bins is another."""
        if state["bank"].shape != self.bank.shape:
            raise ValueError(
                f"Argument `bank` expected shape {tuple(self.bank.shape)}, but got {tuple(state['bank'].shape)}."
                f" Set `num_timesteps` (or `num_bins`) of AntiGradientControl to {len(state['bank'])}, or train afresh."
            )
        self.bank = state["bank"]
        if "edges" in state:  # else a bank by itself: its bins are those at hand
            self.bins.load_shard_state(state)
        self._anchor.load_shard_state(state)

    def join_replicas(self, group: dist.ProcessGroup | None) -> None:
        """Judge the batches of several processes, which train one shard together, as one batch.

        Args:
            group: These processes, in each step with batches of one size; ``None`` = this process is alone.
        """
        self._replicas = group

    @property
    def _replica(self) -> int:
        """Which of the processes that train this shard together this one is."""
        return 0 if self._replicas is None else dist.get_rank(self._replicas)

    def _learn(self, losses: Tensor, timesteps: Tensor) -> None:
        """Take the losses (n,) of unseen images into the bank; those of all replicas alike."""
        check_batch(losses, timesteps, name="sample_loss", continuous=True)
        index = self.bins.locate(timesteps.to(losses.device))
        self.epoch_statistics.update_unseen(losses, index)
        if self._replicas is not None:
            losses, index = gather_rows(losses, self._replicas), gather_rows(index, self._replicas)
        self.bank.copy_(update_anchored_bank(self.bank, losses, index, self.decay))

    def _observe(self, sample_loss: Tensor, timesteps: Tensor) -> Selection | None:
        """Record a training batch; return the samples to keep, or None to leave the loss untouched."""
        check_batch(sample_loss, timesteps, name="sample_loss", continuous=True)
        losses = sample_loss.detach()
        timesteps = timesteps.detach().to(losses.device)
        own = slice(None)
        if self._replicas is not None:
            own = slice(self._replica, None, dist.get_world_size(self._replicas))
            losses, timesteps = gather_rows(losses, self._replicas), gather_rows(timesteps, self._replicas)
        if self._is_first_batch:
            self.bins.inspect(timesteps)
            self._is_first_batch = False
        self.epoch_statistics.out_of_range += self.bins.out_of_range(timesteps[own])
        index = self.bins.index(timesteps)
        keep = keep_mask(losses, index, self.bank, self.threshold)
        if not self._anchor.is_on:
            self.bank.copy_(update_bank(self.bank, losses, index, self.decay))
        self._batch_size = len(losses[own])
        self.epoch_statistics.update(losses[own], index[own], keep=keep[own])
        self.last_skip_rate = 1 - keep[own].float().mean()
        if self.threshold == 0:
            return None
        if self.normalize == "batch":
            return Selection(keep[own], divisor=self._batch_size)
        if self._replicas is None:
            return Selection(keep)
        # DDP takes the mean of the replicas' gradients: each divides by its share of the number that all keep.
        return Selection(keep[own], divisor=keep.sum().clamp(min=1) / dist.get_world_size(self._replicas))
