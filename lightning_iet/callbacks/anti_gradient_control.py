"""Anti-gradient control as a callback: it holds the loss bank and decides when; the arithmetic is in ``functional``."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_iet.callbacks.seams import Refusal, Seam, Selection, open_seam
from lightning_iet.callbacks.skip_statistics import SkipReaders, SkipStatistics
from lightning_iet.callbacks.timestep_bins import TimestepBins
from lightning_iet.functional.anti_gradient import check_batch, keep_mask, update_bank
from lightning_iet.utilities.agc_checks import check_arguments, check_some_losses, check_trainer
from lightning_iet.utilities.lightning import Callback
from lightning_iet.utilities.replicas import gather_rows

__all__ = ["AntiGradientControl"]


class AntiGradientControl(SkipReaders, Callback):
    r"""Leave samples out of the training loss that the model is about to memorise (anti-gradient control, AGC).

    A sample whose loss is far under what is usual at its timestep is easily memorised. With the loss bank :math:`b_t`,
    a running mean of the loss per timestep, and the threshold :math:`\lambda`, each batch trains on

    .. math:: L = \frac{\sum_i k_i \, l_i}{\max(1, \sum_i k_i)}, \qquad k_i = [\, l_i \ge \lambda \, b_{t_i} \,],

    after which every sample enters the bank: :math:`b_{t_i} \leftarrow d \, b_{t_i} + (1 - d) \, l_i`.

    Method: Liu, Guan, Wu, Miao, *Iterative Ensemble Training with Anti-Gradient Control for Mitigating Memorization in
    Diffusion Models*, ECCV 2024, https://arxiv.org/abs/2407.15328.

    It works on any LightningModule. Where the losses come from is settled in the first step, and said in the log:

    1. from an attribute ``loss_reducer(sample_loss, timesteps)``, such as ``DiffusionModule`` has;
    2. else from ``training_step``, if it returns a dict with ``loss`` (a scalar), ``sample_loss`` and ``timesteps``
       (B,), under automatic optimization;
    3. else hooks find the denoiser, the outermost module that is called with a batch and one number per row of it; the
       first squared or absolute error behind its output is each sample's loss, and rows of the gradient at that output
       are masked. A test of the first batch makes sure that rows and losses belong together, or AGC refuses to train.

    Only the gradient changes, not what the module logs; after the fit the module is as it was. ``agc/skip_rate`` is
    logged once per epoch: the share of samples left out.

    Notes:
        * A loss that is NaN or infinite stays in the loss, where it can be seen, and enters neither the bank nor the
          statistics *(our choice: it would never leave the bank)*.
        * Accumulated gradients: each batch is masked and averaged on its own, as it arrives.
        * Several processes: each has its own bank; statistics are added up over all processes after each epoch.
        * Integer timesteps have an entry of the bank each. Those out of range are found at the first batch of a fit.
          Later ones are counted on the device, so that no step waits for it, and raise at the end of the epoch; until
          then they count at the nearest timestep. Continuous times (sigma, or t in [0, 1]) are cut into bins of equal
          probability, see :class:`~lightning_iet.callbacks.timestep_bins.TimestepBins`.

    Args:
        threshold: :math:`\lambda = 1 /` ``mem_ratio``, in [0, 1]. 0.5 was published for CIFAR-10 and AFHQ, 0.8 for
            Stable Diffusion. 0 is off: the loss is not touched, but bank and statistics are still recorded.
        decay: :math:`d` of the bank, in [0, 1).
        num_timesteps: Number of timesteps of the noise schedule, T; integer timesteps lie in [0, T).
        num_bins: Number of entries of the bank; default: ``num_timesteps``.
        denoiser: Name of the denoiser in the module, such as ``"model.unet"``; by default it is found. If it or
            ``timestep`` is given, the third way is taken. Two denoisers need a callback each.
        timestep: Name of the denoiser's argument that holds the timesteps; by default it is found.

    Attributes:
        bank: Running mean of the loss by bin of the timestep, shape (num_bins,), float32. It belongs to a shard.
        bins: Which entry of the bank a timestep belongs to; continuous ones belong to a shard.

    Raises:
        ValueError: If an argument is out of range, or, at the first batch, if no way leads to the losses, keys
            are missing, shapes disagree or timesteps are out of range.
        TypeError: At the first batch, if what should be a tensor is something else, or without a Lightning trainer.

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

    def __init__(
        self,
        threshold: float = 0.5,
        *,
        decay: float = 0.8,
        num_timesteps: int = 1000,
        num_bins: int | None = None,
        denoiser: str | None = None,
        timestep: str | None = None,
    ) -> None:
        super().__init__()
        check_arguments(threshold, decay, num_timesteps, num_bins)
        self.threshold = threshold
        self.decay = decay
        self.num_timesteps = num_timesteps
        self.denoiser = denoiser
        self.timestep = timestep
        self.bins = TimestepBins(num_timesteps, num_bins)
        self.bank = torch.zeros(self.bins.num_bins)
        self._statistics = SkipStatistics(self.bins.num_bins)
        self._stack = ExitStack()
        self._seam = Seam()
        self._is_first_batch = True
        self._is_announced = False
        self._num_steps = 0
        self._replicas: dist.ProcessGroup | None = None
        self.last_skip_rate: Tensor | None = None

    @property
    def state_key(self) -> str:
        """Name in a checkpoint: callbacks on two denoisers have one each."""
        return super().state_key if self.denoiser is None else self._generate_state_key(denoiser=self.denoiser)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and move to the module's device before a checkpoint is read."""
        if stage != "fit":
            return
        check_trainer(trainer, self)
        # The module itself is moved only after this hook.
        device = trainer.strategy.root_device
        # Copies: tensors handed to spawned processes share their memory with the other processes.
        self.bank = self.bank.to(device, copy=True)
        self.bins.to(device)
        self._statistics.to(device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the seam."""
        self._is_first_batch, self._is_announced, self._num_steps = True, False, 0
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        seam = open_seam(
            pl_module,
            self._observe,
            denoiser=self.denoiser,
            timestep=self.timestep,
            several_optimizers=len(trainer.optimizers) > 1,
            scale=None if scaler is None else scaler.scale,
        )
        with self._unless_off():
            self._seam = self._stack.enter_context(seam)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the seam listen."""
        self._num_steps += 1
        self._seam.begin_step()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Decide about the batch; refuse a module whose losses the seam has not seen: AGC would do nothing."""
        with self._unless_off():
            self._seam.before_backward(loss)

    @contextmanager
    def _unless_off(self) -> Iterator[None]:
        """What is switched off refuses nothing: it records nothing, and says so."""
        try:
            yield
        except Refusal as refusal:
            if self.threshold > 0:
                raise
            rank_zero_info(f"AntiGradientControl is off, and records nothing: {refusal}")
            self._stack.close()
            self._seam, self._is_first_batch = Seam(), False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the seam rest; say once what it does."""
        self._seam.end_step()
        if not self._is_announced and self._seam.description:
            self._is_announced = True
            how = f"AntiGradientControl: {self._seam.description}; {self.bins.describe()}."
            rank_zero_info(f"{how} {self._seam.caution}".strip())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the seam."""
        self._stack.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the seam."""
        self._stack.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the seam after an exit by which the other hooks were not called."""
        self._stack.close()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch of all processes to the run, and log its skip rate."""
        if self._is_first_batch:
            check_some_losses(pl_module, self._num_steps)
        skip_rate, num_outside = self._statistics.end_epoch(trainer.strategy)
        if num_outside:  # equal on all processes: none is left waiting for the others
            raise self.bins.range_error(f"{num_outside} others in this epoch")
        # Equal on all processes; a sync would be one that a progress bar starts on the first process alone.
        several = sum(isinstance(callback, AntiGradientControl) for callback in trainer.callbacks) > 1  # type: ignore[attr-defined]
        name = f"agc/{self.denoiser}/skip_rate" if several else "agc/skip_rate"
        pl_module.log(name, skip_rate, prog_bar=True)

    def state_dict(self) -> dict[str, Any]:
        """Bank, bins and statistics; of several processes, the one that writes the checkpoint saves its own."""
        return self.shard_state() | {"continuous": self.bins.continuous} | self._statistics.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; ValueError if it was saved with another number of bins."""
        names = self.shard_state().keys()
        self.load_shard_state({name: state_dict[name].to(self.bank.device, copy=True) for name in names})
        self.bins.continuous = state_dict["continuous"]
        self._statistics.load_state_dict(state_dict)

    def shard_state(self) -> dict[str, Tensor]:
        """References to the tensors in which shards differ: the bank and the bins. They are updated in place."""
        return {"bank": self.bank} | self.bins.shard_state()

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

    def join_replicas(self, group: dist.ProcessGroup | None) -> None:
        """Judge the batches of several processes, which train one shard together, as one batch.

        Args:
            group: These processes, in each step with batches of one size; ``None`` = this process is alone.
        """
        self._replicas = group

    def _observe(self, sample_loss: Tensor, timesteps: Tensor) -> Selection | None:
        """Record a training batch; return the samples to keep, or None to leave the loss untouched."""
        check_batch(sample_loss, timesteps, name="sample_loss", continuous=True)
        losses = sample_loss.detach()
        timesteps = timesteps.detach().to(losses.device)
        own = slice(None)
        if self._replicas is not None:
            own = slice(dist.get_rank(self._replicas), None, dist.get_world_size(self._replicas))
            losses, timesteps = gather_rows(losses, self._replicas), gather_rows(timesteps, self._replicas)
        if self._is_first_batch:
            self.bins.inspect(timesteps)
            self._is_first_batch = False
        self.epoch_statistics.out_of_range += self.bins.out_of_range(timesteps[own])
        index = self.bins.index(timesteps)
        keep = keep_mask(losses, index, self.bank, self.threshold)
        self.bank.copy_(update_bank(self.bank, losses, index, self.decay))
        self.epoch_statistics.update(losses[own], index[own], keep=keep[own])
        self.last_skip_rate = 1 - keep[own].float().mean()
        if self.threshold == 0:
            return None
        if self._replicas is None:
            return Selection(keep)
        # DDP takes the mean of the replicas' gradients: each divides by its share of the number that all keep.
        return Selection(keep[own], divisor=keep.sum().clamp(min=1) / dist.get_world_size(self._replicas))
