"""Anti-gradient control as a callback: it holds the loss bank and decides when; the arithmetic is in ``functional``."""

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_iet.callbacks.seams import open_seam
from lightning_iet.callbacks.timestep_statistics import TimestepStatistics
from lightning_iet.functional.anti_gradient import check_batch, keep_mask, update_bank

__all__ = ["AntiGradientControl"]


class AntiGradientControl(Callback):
    r"""Leave samples out of the training loss that the model is about to memorise (anti-gradient control, AGC).

    A sample whose loss is far under what is usual at its timestep is easily memorised. With the loss bank :math:`b_t`,
    a running mean of the loss per timestep, and the threshold :math:`\lambda`, each batch trains on

    .. math:: L = \frac{\sum_i k_i \, l_i}{\max(1, \sum_i k_i)}, \qquad k_i = [\, l_i \ge \lambda \, b_{t_i} \,],

    after which every sample enters the bank: :math:`b_{t_i} \leftarrow d \, b_{t_i} + (1 - d) \, l_i`.

    Method: Liu, Guan, Wu, Miao, *Iterative Ensemble Training with Anti-Gradient Control for Mitigating Memorization in
    Diffusion Models*, ECCV 2024, https://arxiv.org/abs/2407.15328.

    It works on any LightningModule with automatic optimization that has an attribute ``loss_reducer(sample_loss,
    timesteps)``, such as ``DiffusionModule``, or whose ``training_step`` returns a dict with ``loss`` (a scalar),
    ``sample_loss`` (B,) and ``timesteps`` (B,). Only the loss that is differentiated changes, not what the module logs;
    after the fit the module is as it was. ``agc/skip_rate`` is logged once per epoch: the share of samples left out.

    Notes:
        * A loss that is NaN or infinite stays in the loss, where it can be seen, and enters neither the bank nor the
          statistics *(our choice: it would never leave the bank)*.
        * Accumulated gradients: each batch is masked and averaged on its own, as it arrives.
        * Several processes: each has its own bank; statistics are added up over all processes after each epoch.
        * Timesteps out of range are found at the first batch of a fit. Later ones are counted on the device, so that
          no step waits for it, and raise at the end of the epoch; until then they count at the nearest timestep.

    Args:
        threshold: :math:`\lambda = 1 /` ``mem_ratio``, in [0, 1]. 0.5 was published for CIFAR-10 and AFHQ, 0.8 for
            Stable Diffusion. 0 is off: the loss is not touched, but bank and statistics are still recorded.
        decay: :math:`d` of the bank, in [0, 1).
        num_timesteps: Number of timesteps of the noise schedule, T; timesteps are integers in [0, T).

    Attributes:
        bank: Running mean of the loss by timestep, shape (T,), float32. It belongs to a shard.
        epoch_statistics: The current epoch of this process, over all shards that it hosts.
        run_statistics: The finished epochs of all processes.

    Raises:
        ValueError: If an argument is out of range, if the module optimizes manually, or, at the first batch, if keys
            are missing, shapes disagree or timesteps are out of range.
        TypeError: At the first batch, if ``training_step`` returns no dict, or timesteps are not integers.

    Example:
        >>> class Constant(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(()))
        ...     def training_step(self, batch, batch_idx):
        ...         sample_loss = self.weight * batch
        ...         timesteps = torch.zeros(len(batch), dtype=torch.long)
        ...         return {"loss": sample_loss.mean(), "sample_loss": sample_loss, "timesteps": timesteps}
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.0)
        >>> agc = AntiGradientControl(threshold=0.5, num_timesteps=1)
        >>> extras = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        >>> trainer = pl.Trainer(callbacks=[agc], accelerator="cpu", max_epochs=1, **dict.fromkeys(extras, False))
        >>> trainer.fit(Constant(), torch.utils.data.DataLoader([1.0, 1.0, 1.0, 0.1], batch_size=2))
        >>> agc.skip_rate()  # the last loss, 0.1, is less than half of the bank's 0.36
        0.25
    """

    def __init__(self, threshold: float = 0.5, *, decay: float = 0.8, num_timesteps: int = 1000) -> None:
        super().__init__()
        _check_arguments(threshold, decay, num_timesteps)
        self.threshold = threshold
        self.decay = decay
        self.num_timesteps = num_timesteps
        self.bank = torch.zeros(num_timesteps)
        self.epoch_statistics = TimestepStatistics(num_timesteps)
        self.run_statistics = TimestepStatistics(num_timesteps)
        self._seam = ExitStack()
        self._is_first_batch = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse manual optimization, and move to the module's device before a checkpoint is read."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "AntiGradientControl expected automatic optimization, but got `automatic_optimization = False` in"
                f" {type(pl_module).__name__}. Let Lightning call backward, or call the functions of"
                " lightning_iet.functional.anti_gradient in its training_step."
            )
        # The module itself is moved only after this hook.
        device = trainer.strategy.root_device
        # Copies: tensors handed to spawned processes share their memory with the other processes.
        self.bank = self.bank.to(device, copy=True)
        self.epoch_statistics = self.epoch_statistics.copy_to(device)
        self.run_statistics = self.run_statistics.copy_to(device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the seam."""
        self._is_first_batch = True
        self._seam.enter_context(open_seam(pl_module, self._observe))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Refuse a module whose losses do not pass through the seam: AGC would do nothing, and nobody would know."""
        if self._is_first_batch:
            raise ValueError(
                f"AntiGradientControl expected {type(pl_module).__name__}.training_step to call `loss_reducer` on"
                " losses that require a gradient, but got no such call. Call it, or rename that attribute."
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the seam."""
        self._seam.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the seam."""
        self._seam.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the seam after an exit by which the other hooks were not called."""
        self._seam.close()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch of all processes to the run, and log its skip rate."""
        epoch = self.epoch_statistics
        for buffer in epoch.buffers():
            buffer.copy_(trainer.strategy.reduce(buffer, reduce_op="sum"))
        skip_rate, num_outside = epoch.skip_rate(), int(epoch.out_of_range)
        self.run_statistics.add(epoch)
        epoch.reset()
        if num_outside:  # equal on all processes: none is left waiting for the others
            raise self._range_error(f"{num_outside} others in this epoch")
        # Equal on all processes; a sync would be one that a progress bar starts on the first process alone.
        pl_module.log("agc/skip_rate", skip_rate, prog_bar=True)

    def skip_rate(self) -> float:
        """Share of all samples so far that were left out of the loss, in [0, 1]; 0 before the first sample.

        Reads the finished epochs of all processes and the current epoch of this one, without talking to the others.
        """
        return float(self._statistics().skip_rate())

    def skip_rate_by_timestep(self, num_bins: int = 50) -> Tensor:
        """Share of samples left out, as :meth:`skip_rate`, in equal bins of the timestep.

        Args:
            num_bins: At least 1; no more than ``num_timesteps`` are made.

        Returns:
            Float tensor of shape (num_bins,) on the CPU, smallest timesteps first; NaN where no sample was seen.
        """
        return self._statistics().mean_by_timestep("skipped", num_bins)

    def loss_by_timestep(self, num_bins: int = 50) -> Tensor:
        """Mean loss of all samples so far, left out or not, in equal bins of the timestep.

        Arguments and result as of :meth:`skip_rate_by_timestep`.
        """
        return self._statistics().mean_by_timestep("loss_sum", num_bins)

    def state_dict(self) -> dict[str, Any]:
        """Bank and statistics, tensors only; of several processes, the one that writes the checkpoint saves its own."""
        return {
            "bank": self.bank,
            "epoch_statistics": self.epoch_statistics.state_dict(),
            "run_statistics": self.run_statistics.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; ValueError if it was saved with another ``num_timesteps``."""
        self._check_bank(state_dict["bank"])
        self.bank = state_dict["bank"].to(self.bank.device, copy=True)
        self.epoch_statistics.load_state_dict(state_dict["epoch_statistics"])
        self.run_statistics.load_state_dict(state_dict["run_statistics"])

    def shard_state(self) -> dict[str, Tensor]:
        """Reference to the tensor in which shards differ: the bank. It is updated in place."""
        return {"bank": self.bank}

    def load_shard_state(self, state: dict[str, Tensor]) -> None:
        """Put the bank of another shard in place, by reference; ValueError if its length is not ``num_timesteps``."""
        self._check_bank(state["bank"])
        self.bank = state["bank"]

    def _observe(self, sample_loss: Tensor, timesteps: Tensor) -> Tensor | None:
        """Record a training batch; return the samples to keep, (B,), or None to leave the loss untouched."""
        check_batch(sample_loss, timesteps, name="sample_loss")
        if self._is_first_batch:
            self._check_range(timesteps)
            self._is_first_batch = False
        losses = sample_loss.detach()
        timesteps = self._clamp(timesteps.to(losses.device, torch.long))
        keep = keep_mask(losses, timesteps, self.bank, self.threshold)
        self.bank.copy_(update_bank(self.bank, losses, timesteps, self.decay))
        self.epoch_statistics.update(losses, timesteps, keep=keep)
        return keep if self.threshold > 0 else None

    def _check_range(self, timesteps: Tensor) -> None:
        """Look at the values on the host: a mistake in the set-up shows in the first batch."""
        outside = timesteps[(timesteps < 0) | (timesteps >= self.num_timesteps)]
        if outside.numel():
            raise self._range_error(str(int(outside[0])))

    def _clamp(self, timesteps: Tensor) -> Tensor:
        """Count timesteps out of range and pull them into it, without a wait for the device."""
        clamped = timesteps.clamp(0, self.num_timesteps - 1)
        self.epoch_statistics.out_of_range += (clamped != timesteps).sum()
        return clamped

    def _range_error(self, found: str) -> ValueError:
        return ValueError(
            f"Argument `timesteps` expected values in [0, {self.num_timesteps}), but got {found}."
            " Set `num_timesteps` of AntiGradientControl to that of the noise schedule."
        )

    def _statistics(self) -> TimestepStatistics:
        total = self.run_statistics.copy_to(self.bank.device)
        total.add(self.epoch_statistics)
        return total

    def _check_bank(self, bank: Tensor) -> None:
        if bank.shape != (self.num_timesteps,):
            raise ValueError(
                f"Argument `bank` expected shape ({self.num_timesteps},), but got {tuple(bank.shape)}."
                f" Set `num_timesteps` of AntiGradientControl to {bank.shape[0]}, or train afresh."
            )


def _check_arguments(threshold: float, decay: float, num_timesteps: int) -> None:
    if not 0 <= threshold <= 1:
        remedy = f"For a mem_ratio of {threshold} pass {1 / threshold:.3g}." if threshold > 1 else "0 switches AGC off."
        raise ValueError(f"Argument `threshold` expected a number in [0, 1], but got {threshold}. {remedy}")
    if not 0 <= decay < 1:
        raise ValueError(f"Argument `decay` expected a number in [0, 1), but got {decay}. 0.8 is the published value.")
    if num_timesteps < 1:
        raise ValueError(
            f"Argument `num_timesteps` expected at least 1, but got {num_timesteps}. Pass that of the noise schedule."
        )
