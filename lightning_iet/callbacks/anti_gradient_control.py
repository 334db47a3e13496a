"""Anti-gradient control as a callback: it holds the loss bank and decides when; the arithmetic is in ``functional``."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_iet.callbacks.anchor import Anchor
from lightning_iet.callbacks.bank_keeper import BankKeeper
from lightning_iet.callbacks.gap_report import log_gap, publish_gap
from lightning_iet.callbacks.seams import Refusal, Seam, Selection, open_seam
from lightning_iet.callbacks.skip_statistics import SkipStatistics
from lightning_iet.callbacks.timestep_bins import TimestepBins
from lightning_iet.callbacks.unseen_images import Reference, UnseenImages
from lightning_iet.utilities.agc_checks import check_arguments, check_reference, check_some_losses, check_trainer
from lightning_iet.utilities.lightning import Callback

__all__ = ["AntiGradientControl"]


class AntiGradientControl(BankKeeper, Callback):
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

    *Anchored* AGC (ours, not published elsewhere as far as we know): with another ``reference``, the bank holds losses
    of images that the model does not train on. It then does not sink while the training set is learnt by heart, and a
    sample gives no more gradients at a timestep once the model denoises it better there than it denoises unseen
    images. They are measured in every n-th step by the module's own ``training_step``, in eval mode, without a backward
    pass, and with random generators of their own; the bank takes the n values of a bin as
    :math:`b \leftarrow d^n b + (1 - d^n) \, \bar{l}`. Logged by epoch: ``agc/gap``, how far training losses lie under
    unseen ones (0: not; 1: known by heart), and by tenths of the timesteps ``agc/training_loss/bin_0`` …,
    ``agc/unseen_loss/…`` and ``agc/skip_rate/…``; ``gap.png`` in the run folder shows them over time. All this is
    recorded with threshold 0 too. See docs/explanation/anchored-agc.md.

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
            Stable Diffusion. 0 is off: the loss is not touched, but bank and statistics are still recorded. Of unseen
            images, 0.9 lets samples be learnt hardly better than these *(our choice)*.
        decay: :math:`d` of the bank, in [0, 1). Default: 0.8, which was published; of unseen images 0.9 *(our choice)*.
        num_timesteps: Number of timesteps of the noise schedule, T; integer timesteps lie in [0, T).
        num_bins: Number of entries of the bank. Default: ``num_timesteps``; of unseen images, which are few, at most 50
            *(our choice)*.
        reference: Whose losses the bank holds: ``"train"``, those of the training samples; ``"held_out"``, those of the
            data module's ``anchor_set``, else of some of its validation images; ``"other_shards"``, those of the
            samples that the shard at work has not trained on since the last averaging.
        normalize: What the sum of the kept losses is divided by: ``"kept"``, their number; ``"batch"``, the size of the
            batch, so that the step shrinks as samples drop out. Default: ``"kept"``, and ``"batch"`` with a reference
            to unseen images.
        reference_every: Unseen images are measured in every so many steps (of each shard). A measurement of as many
            images as the batch has costs a third of a step *(our choice: 6, with
            which steps take up to 1.10 times as long; docs/explanation/anchored-agc.md)*.
        reference_batch_size: Number of images in a measurement, drawn with replacement. Default: as many as in the
            training batch.
        reference_images: Number of held-out images. Default: the whole ``anchor_set``, or 16 of the validation set.
        denoiser: Name of the denoiser in the module, such as ``"model.unet"``; by default it is found. If it or
            ``timestep`` is given, the third way is taken. Two denoisers need a callback each.
        timestep: Name of the denoiser's argument that holds the timesteps; by default it is found.

    Attributes:
        bank: Running mean of the loss by bin of the timestep, shape (num_bins,), float32. It belongs to a shard.
        bins: Which entry of the bank a timestep belongs to; continuous ones belong to a shard.
        shard: The shard at work, as the averaging callback tells it; None without shards.

    Raises:
        ValueError: If an argument is out of range; before the first step, if there are no unseen images; or, at the
            first batch, if no way leads to the losses, keys are missing, shapes disagree, timesteps are out of range,
            or ``training_step`` cannot be called on unseen images.
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
        decay: float | None = None,
        num_timesteps: int = 1000,
        num_bins: int | None = None,
        reference: Reference = "train",
        normalize: Literal["kept", "batch"] | None = None,
        reference_every: int = 6,
        reference_batch_size: int | None = None,
        reference_images: int | None = None,
        denoiser: str | None = None,
        timestep: str | None = None,
    ) -> None:
        super().__init__()
        is_anchored = reference != "train"
        decay = (0.9 if is_anchored else 0.8) if decay is None else decay
        check_arguments(threshold, decay, num_timesteps, num_bins)
        check_reference(
            reference, normalize, reference_every=reference_every, reference_batch_size=reference_batch_size,
            reference_images=reference_images,
        )  # fmt: skip
        self.threshold = threshold
        self.decay = decay
        self.num_timesteps = num_timesteps
        self.denoiser = denoiser
        self.timestep = timestep
        self.reference = reference
        self.normalize = normalize or ("batch" if is_anchored else "kept")
        if num_bins is None and is_anchored:
            num_bins = min(50, num_timesteps)
        self.bins = TimestepBins(num_timesteps, num_bins)
        self.bank = torch.zeros(self.bins.num_bins)
        self._statistics = SkipStatistics(self.bins.num_bins)
        self._stack = ExitStack()
        self._seam = Seam()
        self._anchor = Anchor(
            reference, every=reference_every, batch_size=reference_batch_size, num_images=reference_images
        )
        self._is_first_batch = True
        self._is_announced = False
        self._num_steps = 0

    @property
    def state_key(self) -> str:
        """Name in a checkpoint; callbacks on two denoisers have one each."""
        return super().state_key if self.denoiser is None else self._generate_state_key(denoiser=self.denoiser)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and move to the module's device before a checkpoint is read."""
        if stage != "fit":
            return
        check_trainer(trainer, self)
        # The module itself is moved only after this hook.
        device, self.shard = trainer.strategy.root_device, None
        # Copies: tensors handed to spawned processes share their memory with the other processes.
        self.bank = self.bank.to(device, copy=True)
        self.bins.to(device)
        self._statistics.to(device)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the held-out images."""
        self._anchor.find_held_out(trainer)

    @property
    def unseen_images(self) -> UnseenImages | None:
        """Where unseen images come from, while a run lasts; None without a reference to such."""
        return self._anchor.images

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the seam."""
        self._is_first_batch, self._is_announced, self._num_steps = True, False, 0
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        seam = open_seam(
            pl_module,
            self._hear,
            denoiser=self.denoiser,
            timestep=self.timestep,
            several_optimizers=len(trainer.optimizers) > 1,
            scale=None if scaler is None else scaler.scale,
        )
        with self._unless_off():
            self._seam = self._stack.enter_context(seam)
            self._anchor.open(trainer, pl_module, self._seam)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the seam listen."""
        self._num_steps += 1
        self._anchor.begin_step(batch_idx)
        self._seam.begin_step()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Decide about the batch; refuse a module whose losses the seam has not seen: AGC would do nothing."""
        with self._unless_off():
            self._seam.before_backward(loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure unseen images: the batch is judged, its graph is gone, and the optimizer has yet to step."""
        if not self._anchor.is_due():
            return
        shard = trainer.global_rank if self.shard is None else self.shard
        self._learn(*self._anchor.measure(self._batch_size, shard=shard, replica=self._replica))

    @contextmanager
    def _unless_off(self) -> Iterator[None]:
        """What is switched off refuses nothing: it records nothing, and says so."""
        try:
            yield
        except Refusal as refusal:
            if self.threshold > 0 or self._anchor.is_on:
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
        """Close the seam, and draw what was recorded of unseen images."""
        self._stack.close()
        if self._anchor.is_on and trainer.is_global_zero:
            publish_gap(trainer, self.gap_history, prefix=self._name(trainer, ""), num_timesteps=self.num_timesteps)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the seam."""
        self._stack.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the seam after an exit by which the other hooks were not called."""
        self._stack.close()
        self._anchor.close()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch of all processes to the run, and log its skip rate."""
        if self._is_first_batch:
            check_some_losses(pl_module, self._num_steps)
        skip_rate, num_outside = self._statistics.end_epoch(trainer.strategy)
        if num_outside:  # equal on all processes: none is left waiting for the others
            raise self.bins.range_error(f"{num_outside} others in this epoch")
        # Equal on all processes; a sync would be one that a progress bar starts on the first process alone.
        pl_module.log(self._name(trainer, "skip_rate"), skip_rate, prog_bar=True)
        if self._anchor.is_on:
            log_gap(trainer, pl_module, self._statistics.last, prefix=self._name(trainer, ""))

    def _name(self, trainer: pl.Trainer, what: str) -> str:
        several = sum(isinstance(callback, AntiGradientControl) for callback in trainer.callbacks) > 1  # type: ignore[attr-defined]
        return f"agc/{self.denoiser}/{what}" if several else f"agc/{what}"

    def _hear(self, sample_loss: Tensor, timesteps: Tensor) -> Selection | None:
        """What the seam shows: a training batch, or unseen images, which it leaves alone."""
        return None if self._anchor.hears(sample_loss, timesteps) else self._observe(sample_loss, timesteps)
