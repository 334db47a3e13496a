"""Threshold-aware augmentation as a callback: it holds the magnitudes; the arithmetic is in ``functional``."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_iet.callbacks.anti_gradient_control import AntiGradientControl
from lightning_iet.callbacks.anti_gradient_control.reference import MeasuredStep
from lightning_iet.callbacks.anti_gradient_control.sample_record import share_rows, training_set
from lightning_iet.callbacks.anti_gradient_control.timesteps import NUM_BANDS, in_bands, named_by_band
from lightning_iet.callbacks.parameter_averaging import ParameterAveragingCallback
from lightning_iet.data.augmentation import (
    AUGMENTATION_SEED,
    Augmented,
    Magnitudes,
    Operation,
    augment_rows,
    check_channels,
    check_operations,
    check_range,
    find_layer,
    image_entry,
    put_entry,
)
from lightning_iet.data.images import ImageDataModule
from lightning_iet.data.sharding import ShardedDataModule, find_wrapper, inner_datamodule
from lightning_iet.functional.checks import check_choice
from lightning_iet.functional.sample_record import last_of_each, sum_by_index
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.functional.threshold_aware_augmentation import (
    augmentation_magnitude,
    augmentation_strength,
    check_augmentation,
)
from lightning_iet.shards.groups import gather_rows
from lightning_iet.utilities.checkpoints import next_epoch, skips_epoch_end, warn_of_changes
from lightning_iet.utilities.lightning import Callback, find_callback, find_callbacks, is_cut_short, log_values

_JUDGEMENT_SEED = 4  # tells these seeds from those of training steps

When: TypeAlias = Literal["next_draw", "same_step"]
"""When a sample that was judged is augmented: the next time that it is drawn, or at once."""


class ThresholdAwareAugmentation(Callback):
    r"""Augment the samples whose loss lies just above the threshold of anti-gradient control (TAA of IET-AGC+).

    With the loss bank :math:`b_t` and the threshold :math:`\lambda`, a sample has :math:`\rho = l / (\lambda b_t)`. One
    with :math:`1 \le \rho <` ``band`` is only just kept: its next draw is augmented by RandAugment with magnitude

    .. math:: M = \lfloor M_\max \, e^{-\beta (\rho - 1)} \rfloor \quad \text{of 30,}

    and one with :math:`M = 0` stays as it is. A magnitude is used once: after an augmented draw the sample is drawn
    clean, and judged again. An augmented draw is exempt from anti-gradient control: it is always kept, and enters
    neither the loss bank, nor the counts, nor gets a new magnitude.

    Method: Guan, Wu, Huang, Liu, Miao, Yang, *Redistribute Ensemble Training for Mitigating Memorization in Diffusion
    Models*, https://arxiv.org/abs/2502.09434, and the authors' code, where a batch is judged without gradients and then
    trained on augmented. *(our choice: the judgement of one epoch augments the next, so that no step has a second
    forward pass; and one magnitude for each sample, not for a batch.)*

    With ``at="same_step"`` each batch is judged first, by a ``training_step`` without gradients and with random
    generators of its own: its losses decide what is skipped and how the rest is augmented, enter the bank, and are
    counted. The step itself draws new timesteps and noise for the batch, in which samples with :math:`1 \le \rho <`
    ``band`` are augmented on the device. That is nearer to what was published, and takes a quarter to a third of a step
    more *(ours: no sample waits in a queue or is dropped)*. It needs a module with ``loss_reducer``, or one whose
    ``training_step`` returns the losses of samples, and which a step does not change (batch normalization is refused).

    It needs one :class:`AntiGradientControl` with ``criterion="ratio"`` and a threshold above 0, batches with the index
    of each sample, and images in 8 bits or [0, 1]. Data modules of ours need nothing else; in others, wrap the training
    set in :class:`~lightning_iet.data.Augmented`, which ``at="same_step"`` can do without. Which draws are augmented,
    and how, depends on (seed, epoch, index) alone: not on workers, processes, or interruptions.

    Logged by epoch: ``augmentation/share``, the share of draws that were augmented; ``augmentation/magnitude``, the
    mean of the new magnitudes above 0; and by tenths of the timesteps of the judging draws
    ``augmentation/share/bin_0`` …, the share of them with a magnitude above 0, and ``augmentation/magnitude/bin_0`` ….

    Args:
        max_magnitude: :math:`M_\max`, of 30; 5 was published. 0 is off: nothing is changed.
        band: Largest :math:`\rho`; 1.5 was published.
        sharpness: :math:`\beta`; 5 was published.
        num_ops: Operations, one after the other; 2 was published.
        at: ``"next_draw"`` *(our choice)*, or ``"same_step"``.
        defer: Whether a clean draw that gets a magnitude gives no gradient itself, which is nearer to what was
            published; by default it does, so that batches keep their size *(our choice)*. Of ``"next_draw"`` alone.
        ops: Names of the operations of RandAugment that may be drawn; default: all 14, as published. Medical images
            want no Solarize, Posterize, or Equalize.

    Raises:
        ValueError: If an argument is out of range; before the first step, if what it needs is missing.

    Example:
        >>> from lightning_iet import AntiGradientControl
        >>> callbacks = [AntiGradientControl(threshold=0.8), ThresholdAwareAugmentation(max_magnitude=5)]
    """

    def __init__(
        self,
        max_magnitude: int = 5,
        *,
        band: float = 1.5,
        sharpness: float = 5.0,
        num_ops: int = 2,
        at: When = "next_draw",
        defer: bool = False,
        ops: Sequence[Operation] | None = None,
    ) -> None:
        super().__init__()
        check_augmentation(max_magnitude=max_magnitude, band=band, sharpness=sharpness, num_ops=num_ops)
        check_operations(ops)
        check_choice("at", at, get_args(When))
        if defer and at == "same_step":
            raise ValueError(
                "Argument `defer` expected False with at='same_step', where no sample waits for its augmentation, but"
                " got True. Leave it out."
            )
        self.max_magnitude = max_magnitude
        self.band = band
        self.sharpness = sharpness
        self.num_ops = num_ops
        self.at: When = at
        self.defer = defer
        self.ops = None if ops is None else list(ops)
        self._forget()

    def _forget(self) -> None:
        """Begin without magnitudes, of a run that nothing is known of yet."""
        self._control: AntiGradientControl | None = None
        self._magnitudes: Magnitudes | None = None  # what the loader's workers read
        self._saved: dict[str, Any] = {}
        self._resumed_epoch: int | None = None
        self._is_epoch_over = False  # in the checkpoint that the run goes on from
        self._epochs_ended = 0
        self._seed = 0
        self._num_processes = 1
        self._current = torch.zeros(0, dtype=torch.uint8)  # magnitude of each sample in this epoch
        self._next = self._current  # and in the next one
        self._batch = self._current  # magnitude of each row of the batch that is judged
        self._step: MeasuredStep | None = None  # of batches that are judged before their step
        self._is_first_batch = True
        self._put_back: Callable[[], None] | None = None  # undoes what was done to the batch at work
        self._sums = torch.zeros(4, 0)  # by bin: draws judged, those with a magnitude, their magnitudes; [3]: draws

    # --- before training ---------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before the data are read."""
        if stage != "fit":
            return
        self._forget()
        if self.max_magnitude == 0:
            return
        controls = find_callbacks(trainer, AntiGradientControl)
        if len(controls) != 1 or controls[0].criterion != "ratio" or controls[0].is_off:
            found = f"{len(controls)} of them" if len(controls) != 1 else f"criterion={controls[0].criterion!r}"
            if len(controls) == 1 and controls[0].criterion == "ratio":
                found = "a threshold of 0"
            raise ValueError(
                "ThresholdAwareAugmentation expected one AntiGradientControl with criterion='ratio' and a threshold"
                f" above 0, near which samples are augmented, but got {found}. Set it, or max_magnitude=0."
            )
        named = [name for name in ("denoiser", "timestep") if getattr(controls[0], name) is not None]
        if self.at == "same_step" and named:
            # Hooks are tested in the backward pass of the first step, and before it a batch is judged already.
            raise ValueError(
                "Argument `at` expected 'next_draw' with an AntiGradientControl whose losses hooks find, but got"
                f" 'same_step', and {' and '.join(f'`{name}`' for name in named)} of AntiGradientControl. Use"
                " at='next_draw'; or leave these out, if the module has a `loss_reducer` or training_step returns"
                " the losses of samples."
            )
        if getattr(getattr(pl_module, "latents", None), "cache", None) is not None:
            raise ValueError(
                "Argument `cache_latents` expected 'none' with augmented images, which are never the same twice, but"
                " got a cache. Leave it out, or set max_magnitude=0."
            )
        self._control = controls[0]
        self._control.needs_samples = True
        self._control.augmentation = self
        inner = inner_datamodule(trainer)
        if isinstance(inner, ImageDataModule):
            check_channels(inner.channels, self.ops)
        if isinstance(inner, ImageDataModule) and self.at == "next_draw":
            inner.magnitudes = Magnitudes(self.num_ops, self.ops)
            if isinstance(trainer.datamodule, ShardedDataModule):  # type: ignore[attr-defined]
                trainer.datamodule.forget_prepared()  # type: ignore[attr-defined]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find out at which epoch the run goes on."""
        self._resumed_epoch = next_epoch(checkpoint)
        self._is_epoch_over = skips_epoch_end(checkpoint)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the magnitudes of a resumed run before any sample is read."""
        if self._control is None:
            return
        averaging = find_callback(trainer, ParameterAveragingCallback)
        seed = getattr(averaging, "seed", None)
        if seed is None:
            seed = trainer.strategy.broadcast(torch.initial_seed() % 2**63)
        self._seed = int(self._saved.get("seed", seed))
        self._num_processes = trainer.world_size
        if not self._saved and self._resumed_epoch is not None:
            rank_zero_warn("ThresholdAwareAugmentation: the checkpoint was written without it. It starts afresh.")
        if self.at == "same_step":
            return
        self._magnitudes = self._find(trainer)
        if "current" in self._saved:
            self._current, self._next = (self._saved[name].clone() for name in ("current", "next"))
            self._epochs_ended = self._saved["epochs_ended"]
            if self._resumed_epoch is not None and self._resumed_epoch > self._epochs_ended:
                # A checkpoint of the last step of an epoch: Lightning does not call the hooks of its end again.
                self._current, self._epochs_ended = self._next.clone(), self._resumed_epoch
        elif self._resumed_epoch is not None:
            self._epochs_ended = self._resumed_epoch
        if len(self._current):
            self._magnitudes.allocate(len(self._current))
            self._magnitudes.write(self._current, seed=self._seed, epoch=self._epochs_ended)
        else:
            self._magnitudes.clock.copy_(torch.tensor([self._seed, self._epochs_ended]))

    def _find(self, trainer: pl.Trainer) -> Magnitudes:
        """What the loader's samples are augmented by."""
        inner = inner_datamodule(trainer)
        if isinstance(inner, ImageDataModule):
            assert inner.magnitudes is not None  # noqa: S101
            return inner.magnitudes
        augmented = find_wrapper(
            trainer,
            Augmented,
            who="ThresholdAwareAugmentation",
            remedy="Wrap it before images are flipped or normalized.",
        )
        augmented.magnitudes.num_ops, augmented.magnitudes.ops = self.num_ops, self.ops
        return augmented.magnitudes

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the loader reads what is augmented, and make the tables."""
        if self._control is None:
            return
        device = trainer.strategy.root_device
        self._sums = torch.zeros(4, self._control.bins.num_bins, dtype=torch.long, device=device)
        # Of an epoch that is over, the hooks of whose end are not called again, they would enter the next one.
        if "sums" in self._saved and not self._is_epoch_over and trainer.is_global_zero:
            self._sums.copy_(self._saved["sums"])
        if self.at == "same_step":
            self._is_first_batch = True
            self._step = MeasuredStep(
                trainer,
                pl_module,
                who="ThresholdAwareAugmentation",
                expected="to tell the losses of a batch and change nothing, for at='same_step'",
                remedy="Give the module a `loss_reducer`, or use at='next_draw'.",
            )
        if self._magnitudes is None:
            return
        augmented, data = find_layer(Augmented, trainer.train_dataloader), training_set(trainer.train_dataloader)
        if augmented is None or augmented.magnitudes is not self._magnitudes or data is None:
            raise ValueError(
                "ThresholdAwareAugmentation expected the training loader to read lightning_iet.data.Augmented, but it"
                " reads another data set. Keep one Augmented in the data module, and return a loader of it."
            )
        if len(augmented) != len(data):
            inner = "Augmented" if len(augmented) > len(data) else "WithIndex"
            raise ValueError(
                f"ThresholdAwareAugmentation expected Augmented and the index around the same samples, but got"
                f" {len(augmented)} and {len(data)}: {inner} lies within a subset. Put it around the subset."
            )
        if not len(self._current):
            self._current = torch.zeros(len(data), dtype=torch.uint8)
            self._next = self._current.clone()
        for name, table in (("current", self._current), ("next", self._next)):
            if len(table) != len(data):
                raise ValueError(
                    f"Argument `ckpt_path` expected a checkpoint with magnitudes of {len(data)} samples, the size of"
                    f" the training set, but got {len(table)} ({name}). Go on with the same training set."
                )
        self._current, self._next = self._current.to(device), self._next.to(device)

    # --- a batch -----------------------------------------------------------------------------------------------------

    def begin_step(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Judge and augment a batch, if that is done before its step. It waits for the device.

        Raises:
            ValueError: If the batch has no index or no image in it, or the module does not tell its losses.
        """
        if self._step is None or self._control is None:
            return
        self._leave_batch()  # one whose step was left out has had no end
        index = self._control.batch_index
        if index is None:
            raise ValueError(
                "ThresholdAwareAugmentation expected batches with the index of each sample, but got one without. Return"
                " each sample's index from the data set, see lightning_iet.data.WithIndex."
            )
        entry, images = image_entry(batch, len(index))
        if self._is_first_batch:
            check_range(images, "Return them so from the loader and normalize in the step, or use at='next_draw'.")
            self._is_first_batch = False
        samples, epoch = index.tolist(), trainer.current_epoch
        # An epoch draws a sample once, so that its first sample tells a batch, whichever process trains on it.
        seed = derive_seed(self._seed, epoch, samples[0], _JUDGEMENT_SEED)
        found = self._step.measure(self._control.source, lambda: batch, batch_idx, seed=seed, is_training=True)
        if not found and self._step.is_skipped:
            return
        if len(found) != 1:
            raise self._step.unsupported(f"it showed {f'{len(found)} sets of' if found else 'no'} losses")
        self._control.verdict = self._control.judge(*found[0])
        magnitudes = self._batch[self._control.own_rows].tolist()
        seeds = [derive_seed(self._seed, epoch, sample, AUGMENTATION_SEED) for sample in samples]
        augmented = augment_rows(images, magnitudes, seeds=seeds, num_ops=self.num_ops, ops=self.ops)
        self._put_back = put_entry(batch, entry, augmented)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave the batch as it was read: its tensors may be read again in the next epoch."""
        self._leave_batch()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the batch, the data and the control as they were: Lightning calls no teardown after an exception.

        SIGTERM ends all processes; what they hold together is still wanted, for a checkpoint.
        """
        self._leave_batch()
        if not isinstance(exception, SIGTERMException):
            self._detach(trainer)

    def _leave_batch(self) -> None:
        if self._put_back is not None:
            self._put_back()
            self._put_back = None

    def is_augmented(self, index: Tensor) -> Tensor:
        """Tell which samples of a batch were augmented when they were read; boolean, (B,)."""
        if self.at == "same_step":
            return torch.zeros_like(index, dtype=torch.bool)
        return self._current.index_select(0, index.long().clamp(0, len(self._current) - 1)) > 0

    def judge(self, index: Tensor, losses: Tensor, bins: Tensor, bank: Tensor, *, augmented: Tensor) -> Tensor | None:
        """Set the next magnitudes of a batch.

        Args:
            index: The sample of each row, (B,).
            losses: Shape (B,); NaN where a row was augmented.
            bins: Entry of the bank of each row, (B,).
            bank: Before it has learnt from this batch.
            augmented: Which rows were, boolean, (B,).

        Returns:
            Rows that wait for their augmented draw and give no gradient, boolean, (B,); None = none.
        """
        assert self._control is not None  # noqa: S101
        strength = augmentation_strength(
            losses, bins, bank, self._control.threshold, sharpness=self.sharpness, band=self.band
        )
        magnitudes = augmentation_magnitude(strength, self.max_magnitude)
        chosen = magnitudes > 0
        if not self._control.replica:
            clean = (~augmented).long()
            for row, values in enumerate((clean, chosen.long(), magnitudes.long(), torch.ones_like(clean))):
                self._sums[row].index_add_(0, bins, values)
        if self.at == "same_step":
            self._batch = magnitudes
            return None
        group = self._control.sample_group
        if group is not None:
            index, magnitudes = gather_rows(index, group), gather_rows(magnitudes, group)
        index = index.long().clamp(0, len(self._next) - 1)
        # The last draw of a sample wins; all its rows then write the same, whatever their order on the device.
        last = torch.where(last_of_each(index), magnitudes.long(), 0)
        self._next.index_copy_(0, index, sum_by_index(index, last).to(torch.uint8))
        return chosen if self.defer else None

    # --- an epoch ----------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the judgement of this epoch augment the next one, and log."""
        if self._control is None:
            return
        self._log(trainer, pl_module)
        if self._magnitudes is None or not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        self._share()
        self._current.copy_(self._next)
        self._epochs_ended = trainer.current_epoch + 1
        self._magnitudes.write(self._current, seed=self._seed, epoch=self._epochs_ended)

    def _share(self) -> None:
        """Give every process the magnitudes of all samples. Takes part on every process."""
        if self._control is not None and self._magnitudes is not None:
            share_rows([self._next], self._num_processes, self._control.own_samples())

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sums = trainer.strategy.reduce(self._sums.clone(), reduce_op="sum").cpu().double()
        if not is_cut_short(trainer):
            self._sums.zero_()
        judged, chosen, magnitudes, drawn = sums.sum(1)
        if drawn:
            augmented = chosen if self.at == "same_step" else drawn - judged
            pl_module.log("augmentation/share", float(augmented / drawn))
        if chosen:
            pl_module.log("augmentation/magnitude", float(magnitudes / chosen))
        judged, chosen, magnitudes, _ = in_bands(sums, NUM_BANDS)
        means = {"augmentation/share": chosen / judged, "augmentation/magnitude": magnitudes / chosen}
        log_values(trainer, named_by_band(means))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Share the magnitudes a last time; :meth:`state_dict` then needs no other process."""
        if self._control is not None:
            self._share()
            self._num_processes = 1

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the data as they are without augmentation."""
        self._detach(trainer)

    def _detach(self, trainer: pl.Trainer) -> None:
        """Take this off the control and the data. A checkpoint that is written later needs no other process."""
        if self._control is None:
            return
        self._control.augmentation, self._control.needs_samples, self._num_processes = None, False, 1
        self._step = None
        if self._magnitudes is not None:
            self._magnitudes.by_sample.zero_()
        inner = inner_datamodule(trainer)
        if isinstance(inner, ImageDataModule):
            inner.magnitudes = None

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The magnitudes of this epoch and of the next one, and what is logged. Takes part on every process."""
        if self.max_magnitude == 0 or (self.at == "next_draw" and not len(self._current)):
            return {}
        self._share()
        tables = {"current": self._current, "next": self._next} if self.at == "next_draw" else {}
        sums = self._sums.clone()
        if self._num_processes > 1 and sums.numel():
            dist.all_reduce(sums)
        return {
            **{name: table.cpu().clone() for name, table in tables.items()},
            "sums": sums.cpu(),
            "seed": self._seed,
            "epochs_ended": self._epochs_ended,
            "settings": self._settings(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what :meth:`state_dict` returned until the data are there."""
        if self.max_magnitude == 0 or not state_dict:
            return
        self._saved = state_dict
        warn_of_changes("ThresholdAwareAugmentation", state_dict["settings"], self._settings())

    def _settings(self) -> dict[str, Any]:
        names = ("max_magnitude", "band", "sharpness", "num_ops", "at", "defer", "ops")
        return {name: getattr(self, name) for name in names}
