"""Anti-gradient control as a callback: it holds the loss bank and decides when; the arithmetic is in ``functional``."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_iet.callbacks.anti_gradient_control.bins import TimestepBins
from lightning_iet.callbacks.anti_gradient_control.losses import LossSource, Selection, UnsupportedModule, open_losses
from lightning_iet.callbacks.anti_gradient_control.reference import Reference, ReferenceImages, ReferenceLosses
from lightning_iet.callbacks.anti_gradient_control.statistics import (
    GapHistory,
    TimestepStatistics,
    log_gap,
    plot_gap,
)
from lightning_iet.functional.anti_gradient import check_batch, keep_mask, update_anchored_bank, update_bank
from lightning_iet.shards.groups import gather_rows
from lightning_iet.utilities.lightning import Callback


class AntiGradientControl(Callback):
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
       are masked. The first batch is tested: unless each row has a loss of its own, training does not begin.

    *Anchored* AGC (ours, not published elsewhere as far as we know): with another ``reference``, the bank holds losses
    of images that the model does not train on, so that it does not sink while the training set is memorised. They are
    measured in every n-th step by the module's own ``training_step``, in eval mode, without a backward pass, and with
    random generators of their own; the bank takes the n values of a bin as
    :math:`b \leftarrow d^n b + (1 - d^n) \, \bar{l}`. Logged by epoch: ``agc/gap``, how far training losses lie under
    those of unseen images (0: not; 1: all memorised), and by tenths of the timesteps ``agc/training_loss/bin_0`` …,
    ``agc/unseen_loss/…`` and ``agc/skip_rate/…``; ``gap.png`` in the run folder plots them over time, with threshold 0
    too. See docs/explanation/anchored-agc.md.

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
          probability, see :class:`~lightning_iet.callbacks.anti_gradient_control.bins.TimestepBins`.

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

    shard: int | None = None
    last_skip_rate: Tensor | None = None  # of the last batch; the shard log reads it
    _replicas: dist.ProcessGroup | None = None
    _batch_size: int = 0

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
        _check_arguments(threshold, decay, num_timesteps, num_bins)
        _check_choice("reference", reference, ("train", "held_out", "other_shards"))
        _check_choice("normalize", normalize, (None, "kept", "batch"))
        _check_at_least_one(
            reference_every=reference_every,
            reference_batch_size=reference_batch_size,
            reference_images=reference_images,
        )
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
        self.epoch_statistics = TimestepStatistics(self.bins.num_bins)
        self.run_statistics = TimestepStatistics(self.bins.num_bins)
        self.gap_history = GapHistory()
        self._losses = LossSource()
        self._reference = ReferenceLosses(
            reference, every=reference_every, batch_size=reference_batch_size, num_images=reference_images
        )
        self._stack = ExitStack()
        self._is_first_batch = True
        self._is_announced = False
        self._num_steps = 0

    # --- the run -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and move to the module's device before a checkpoint is read."""
        if stage != "fit":
            return
        _check_trainer(trainer, self)
        # The module itself is moved only after this hook. Copies: tensors handed to spawned processes share memory.
        device, self.shard = trainer.strategy.root_device, None
        self.bank = self.bank.to(device, copy=True)
        self.bins.to(device)
        self.epoch_statistics = self.epoch_statistics.copy_to(device)
        self.run_statistics = self.run_statistics.copy_to(device)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the held-out images."""
        self._reference.choose_held_out(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hook the module where its losses are."""
        self._is_first_batch, self._is_announced, self._num_steps = True, False, 0
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        with self._unless_off():
            self._losses = self._stack.enter_context(
                open_losses(
                    pl_module,
                    self.select,
                    denoiser=self.denoiser,
                    timestep=self.timestep,
                    several_optimizers=len(trainer.optimizers) > 1,
                    scale=None if scaler is None else scaler.scale,
                )
            )
            self._reference.open(trainer, pl_module, self._losses)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record what the module computes from now on."""
        self._num_steps += 1
        self._reference.begin_step(batch_idx)
        self.losses.begin_step()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Decide about the batch; refuse a module whose losses were not found: AGC would do nothing."""
        with self._unless_off():
            self.losses.before_backward(loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure reference images: the graph of the batch is gone, and the optimizer has yet to step."""
        if self._reference.is_due():
            shard = trainer.global_rank if self.shard is None else self.shard
            self.learn_reference(*self._reference.measure(self._batch_size, shard=shard, replica=self._replica))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop recording; log once where the losses come from."""
        self.losses.end_step()
        if not self._is_announced and self.losses.description:
            self._is_announced = True
            message = f"AntiGradientControl: {self.losses.description}; {self.bins.describe()}. {self.losses.caution}"
            rank_zero_info(message.strip())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch of all processes to the run, and log its skip rate."""
        if self._is_first_batch and self._num_steps:
            raise ValueError(
                f"AntiGradientControl expected losses to learn from, but none of {self._num_steps} steps had a backward"
                f" pass: {type(pl_module).__name__}.training_step returned None each time. Return a loss."
            )
        epoch = self.epoch_statistics
        for buffer in epoch.buffers():
            buffer.copy_(trainer.strategy.reduce(buffer, reduce_op="sum"))
        self.run_statistics.add(epoch)
        self.gap_history.add(epoch)
        gap, skip_rate, num_outside = GapHistory.of(epoch), epoch.skip_rate(), int(epoch.out_of_range)
        epoch.reset()
        if num_outside:  # equal on all processes: none is left waiting for the others
            raise self.bins.range_error(f"{num_outside} others in this epoch")
        # Equal on all processes; a sync would be one that a progress bar starts on the first process alone.
        pl_module.log(self._prefix(trainer) + "skip_rate", skip_rate, prog_bar=True)
        if self._reference.is_on:
            log_gap(trainer, pl_module, gap, prefix=self._prefix(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the hooks; plot the losses of training and reference images."""
        self._stack.close()
        if self._reference.is_on and trainer.is_global_zero:
            plot_gap(trainer, self.gap_history, prefix=self._prefix(trainer), num_timesteps=self.num_timesteps)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._stack.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the hooks after an exit by which the other hooks were not called."""
        self._stack.close()
        self._reference.close()

    @contextmanager
    def _unless_off(self) -> Iterator[None]:
        """Refuse an unsupported module only if AGC is on; else say that nothing is recorded."""
        try:
            yield
        except UnsupportedModule as error:
            if self.threshold > 0 or self._reference.is_on:
                raise
            rank_zero_info(f"AntiGradientControl is off, and records nothing: {error}")
            self._stack.close()
            self._losses, self._is_first_batch = LossSource(), False

    def _prefix(self, trainer: pl.Trainer) -> str:
        """Beginning of the names of what is logged."""
        several = sum(isinstance(callback, AntiGradientControl) for callback in trainer.callbacks) > 1  # type: ignore[attr-defined]
        return f"agc/{self.denoiser}/" if several else "agc/"

    # --- the method --------------------------------------------------------------------------------------------------

    def select(self, sample_loss: Tensor, timesteps: Tensor) -> Selection | None:
        """Decide about a training batch, and let the bank learn from it.

        Args:
            sample_loss: One loss per sample, shape (B,).
            timesteps: Shape (B,).

        Returns:
            The samples to keep; None to leave the loss untouched.
        """
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
        bins = self.bins.index(timesteps)
        keep = keep_mask(losses, bins, self.bank, self.threshold, validate_args=False)
        if not self._reference.is_on:
            self.bank.copy_(update_bank(self.bank, losses, bins, self.decay, validate_args=False))
        self._batch_size = len(losses[own])
        self.epoch_statistics.update(losses[own], bins[own], keep=keep[own])
        self.last_skip_rate = 1 - keep[own].float().mean()
        if self.threshold == 0:
            return None
        if self.normalize == "batch":
            return Selection(keep[own], divisor=self._batch_size)
        if self._replicas is None:
            return Selection(keep)
        # DDP takes the mean of the replicas' gradients: each divides by its share of the number that all keep.
        return Selection(keep[own], divisor=keep.sum().clamp(min=1) / dist.get_world_size(self._replicas))

    def learn_reference(self, losses: Tensor, timesteps: Tensor) -> None:
        """Let the bank learn from reference images, those of all replicas alike.

        Args:
            losses: One per image, shape (n,).
            timesteps: Shape (n,).
        """
        check_batch(losses, timesteps, name="sample_loss", continuous=True)
        bins = self.bins.locate(timesteps.to(losses.device))
        self.epoch_statistics.update_unseen(losses, bins)
        if self._replicas is not None:
            losses, bins = gather_rows(losses, self._replicas), gather_rows(bins, self._replicas)
        self.bank.copy_(update_anchored_bank(self.bank, losses, bins, self.decay, validate_args=False))

    # --- shards and replicas -----------------------------------------------------------------------------------------

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

    def shard_state(self) -> dict[str, Tensor]:
        """References to the tensors in which shards differ: the bank and the bins. They are updated in place."""
        return {"bank": self.bank} | self.bins.shard_state() | self._reference.shard_state()

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
        self._reference.load_shard_state(state)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Name in a checkpoint; callbacks on two denoisers have one each."""
        return super().state_key if self.denoiser is None else self._generate_state_key(denoiser=self.denoiser)

    def state_dict(self) -> dict[str, Any]:
        """Bank, bins and statistics; of several processes, the one that writes the checkpoint saves its own."""
        return {
            **self.shard_state(),
            "continuous": self.bins.continuous,
            **self._reference.state_dict(),
            "epoch_statistics": self.epoch_statistics.state_dict(),
            "run_statistics": self.run_statistics.state_dict(),
            "gaps": self.gap_history.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; ValueError if it was saved with another number of bins."""
        self._reference.load_state_dict(state_dict)
        names = self.shard_state().keys()
        self.load_shard_state({name: state_dict[name].to(self.bank.device, copy=True) for name in names})
        self.bins.continuous = state_dict["continuous"]
        # Not strict: checkpoints from before unseen images were counted have none.
        self.epoch_statistics.load_state_dict(state_dict["epoch_statistics"], strict=False)
        self.run_statistics.load_state_dict(state_dict["run_statistics"], strict=False)
        if "gaps" in state_dict:
            self.gap_history.load_state_dict(state_dict["gaps"])

    # --- what the run was like ---------------------------------------------------------------------------------------

    def skip_rate(self) -> float:
        """Share of all samples so far that were left out of the loss, in [0, 1]; 0 before the first sample.

        Reads the finished epochs of all processes and the current epoch of this one, without communication.
        """
        return float(self._all_statistics().skip_rate())

    def skip_rate_by_timestep(self, num_bins: int = 50) -> Tensor:
        """Share of samples left out, as :meth:`skip_rate`, in equal bins of the timestep.

        Args:
            num_bins: At least 1; no more are made than the bank has entries.

        Returns:
            Float tensor of shape (num_bins,) on the CPU, smallest timesteps first; NaN where no sample was seen.
        """
        return self._all_statistics().mean_by_timestep("skipped", num_bins)

    def loss_by_timestep(self, num_bins: int = 50) -> Tensor:
        """Mean loss of all samples so far, kept or not; arguments and result as of :meth:`skip_rate_by_timestep`."""
        return self._all_statistics().mean_by_timestep("loss_sum", num_bins)

    def unseen_loss_by_timestep(self, num_bins: int = 50) -> Tensor:
        """Mean loss of all unseen images so far; arguments and result as of :meth:`skip_rate_by_timestep`."""
        return self._all_statistics().mean_by_timestep("unseen_loss_sum", num_bins)

    def gap(self) -> float:
        """How far training losses lie under those of unseen images, as a share of these; the mean over timesteps.

        Over the last tenth of the finished epochs. 0: the model denoises its training images no better than unseen
        ones; 1: it has memorised them. NaN before the first epoch has ended, and without a reference to unseen images.
        """
        num_rows = len(self.gap_history.rows)
        return float(self.gap_history.gap(max(1, num_rows // 10)).nanmean()) if num_rows else float("nan")

    @property
    def losses(self) -> LossSource:
        """Where the losses of the module come from."""
        return self._losses.active

    @property
    def unseen_images(self) -> ReferenceImages | None:
        """Where unseen images come from, while a run lasts; None without a reference to such."""
        return self._reference.images

    def _all_statistics(self) -> TimestepStatistics:
        """The finished epochs of all processes and the current one of this process."""
        total = self.run_statistics.copy_to(self.epoch_statistics.seen.device)
        total.add(self.epoch_statistics)
        return total


# --- bad input -------------------------------------------------------------------------------------------------------


def _check_arguments(threshold: float, decay: float, num_timesteps: int, num_bins: int | None) -> None:
    """Refuse values that are out of range."""
    if not 0 <= threshold <= 1:
        remedy = f"For a mem_ratio of {threshold} pass {1 / threshold:.3g}." if threshold > 1 else "0 switches AGC off."
        raise ValueError(f"Argument `threshold` expected a number in [0, 1], but got {threshold}. {remedy}")
    if not 0 <= decay < 1:
        raise ValueError(f"Argument `decay` expected a number in [0, 1), but got {decay}. 0.8 is the published value.")
    if num_timesteps < 1:
        raise ValueError(
            f"Argument `num_timesteps` expected at least 1, but got {num_timesteps}. Pass that of the noise schedule."
        )
    if num_bins is not None and num_bins < 1:
        raise ValueError(f"Argument `num_bins` expected at least 1, but got {num_bins}. Leave it out for one each.")


def _check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(f"Argument `{name}` expected one of {', '.join(map(repr, choices))}, but got {value!r}.")


def _check_at_least_one(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"Argument `{name}` expected at least 1, but got {number}. Leave it out for the default.")


def _check_trainer(trainer: Any, callback: AntiGradientControl) -> None:
    """Refuse Fabric, strategies that spread one model over processes, and callbacks that are not told apart."""
    if isinstance(trainer, Fabric):
        raise TypeError(
            f"AntiGradientControl expected a Trainer, but got {type(trainer).__name__}. Call"
            " lightning_iet.functional.anti_gradient in the training loop, see docs/howto/plain-pytorch.md."
        )
    strategies = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if strategies.intersection(("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")):
        raise ValueError(
            f"AntiGradientControl expected a strategy that keeps the model whole, but got"
            f" {type(trainer.strategy).__name__}. Use the strategy 'auto' or 'ddp'."
        )
    names = [other.denoiser for other in getattr(trainer, "callbacks", ()) if isinstance(other, AntiGradientControl)]
    if len(names) > 1 and (None in names or len(set(names)) < len(names)):
        raise ValueError(
            f"AntiGradientControl expected `denoiser` to tell several callbacks apart, but got {names}."
            ' Name the denoiser of each: AntiGradientControl(denoiser="…").'
        )
