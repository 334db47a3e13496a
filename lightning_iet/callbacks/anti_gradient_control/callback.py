"""Anti-gradient control as a callback: it holds the loss bank and decides when; the arithmetic is in ``functional``."""

from contextlib import ExitStack
from math import inf
from typing import Any, Literal, Protocol, TypeAlias, get_args

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_iet.callbacks.anti_gradient_control.losses import LossSource, Selection, UnsupportedModule, open_losses
from lightning_iet.callbacks.anti_gradient_control.reference import Reference, ReferenceImages, ReferenceLosses
from lightning_iet.callbacks.anti_gradient_control.sample_record import (
    SampleCounts,
    SampleDraws,
    SampleRecords,
    TrainingSet,
    count_samples,
    extreme_mean,
    training_set,
    write_sample_report,
)
from lightning_iet.callbacks.anti_gradient_control.timesteps import (
    GapHistory,
    TimestepBins,
    TimestepStatistics,
    log_gap,
    plot_gap,
)
from lightning_iet.data.augmentation import layers
from lightning_iet.data.images import ImageDataModule
from lightning_iet.data.samples import DrawnByWeight, DrawTable, read_index
from lightning_iet.data.shard_sampler import SeededSamples, ShardSampler
from lightning_iet.data.sharding import Seeded, ShardedDataModule, find_wrapper, inner_datamodule
from lightning_iet.functional.anti_gradient import check_batch, keep_mask, update_anchored_bank, update_bank
from lightning_iet.functional.checks import check_choice, check_kinds, check_number
from lightning_iet.functional.sample_record import (
    LogLossStatistics,
    keep_by_record,
    standardized_losses,
    update_log_loss_statistics,
)
from lightning_iet.functional.sharding import to_assignment
from lightning_iet.shards.groups import gather_rows
from lightning_iet.utilities.checkpoints import next_epoch, skips_epoch_end, took_last_batch, warn_of_changes
from lightning_iet.utilities.lightning import Callback, find_callbacks, is_cut_short, is_sharded, is_trial

Criterion: TypeAlias = Literal["ratio", "quantile", "record"]
"""By what a sample is judged: its loss over what is usual, its place among usual losses, or its own record."""
Weigh: TypeAlias = Literal["losses", "draws"]
"""What the weights of ``eta`` act on: how much a sample counts, or how often it is drawn."""


class Augmentation(Protocol):
    """What augments samples close to the threshold, see :class:`ThresholdAwareAugmentation`."""

    def begin_step(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """A training step begins: augment the batch in it, if that is to be done now."""

    def is_augmented(self, index: Tensor) -> Tensor:
        """Tell which samples of a batch were augmented when they were read; boolean, (B,)."""

    def judge(self, index: Tensor, losses: Tensor, bins: Tensor, bank: Tensor, *, augmented: Tensor) -> Tensor | None:
        """Decide how to augment the samples of a batch next; return which wait for that, boolean, (B,)."""


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

    *Criteria* (ours, not published elsewhere as far as we know). One draw says little, for losses scatter. With
    ``criterion="quantile"`` each draw is judged by :math:`z = (\log l_i - \mu_b) / s_b`, where :math:`\mu_b` and
    :math:`s_b` are mean and standard deviation of :math:`\log l` in the bin of its timestep, over the reference images;
    it is kept if :math:`z \ge -z_0`. With ``criterion="record"`` each sample has a record of its own, which needs its
    index in the batch: :math:`r_i \leftarrow \rho \, r_i + (1 - \rho) \, z`, kept or not. It is kept if
    :math:`r_i \ge m`, where the limit :math:`m` is :math:`-z_0`, or with ``delta``
    :math:`\operatorname{median}(r) - \delta`. With ``eta`` all are kept, with weights that fall while a record lies
    below the limit, and rise else,
    :math:`\log w_i \leftarrow \operatorname{clip}(\log w_i + \eta (r_i - m), \log w_{\min}, 0)`; there the limit is the
    median itself, which makes the records alike, unless ``delta`` or ``z0`` is given.
    The median is over the samples of the shard at work. With ``weigh="draws"`` these weights act on how often a sample
    is drawn, not on its loss: an epoch has as many draws as before, and what heavier samples lose others get. See
    docs/explanation/sample-records.md.

    *Counts.* Where batches are known to carry the index of each sample (our data modules,
    :class:`~lightning_iet.data.WithIndex`, or ``sample_index``), draws and skips are counted by sample:
    ``agc/most_skipped`` in the log, ``skips.csv`` and a picture of the most skipped images in the run folder.

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
          probability, see :class:`~lightning_iet.callbacks.anti_gradient_control.timesteps.TimestepBins`.

    Args:
        threshold: :math:`\lambda = 1 /` ``mem_ratio``, in [0, 1]. 0.5 was published for CIFAR-10 and AFHQ, 0.8 for
            Stable Diffusion. 0 is off: the loss is not touched, but bank and statistics are still recorded. Of unseen
            images, 0.9 lets samples be learnt hardly better than these *(our choice)*.
            Used by ``criterion="ratio"`` alone.
        criterion: What a sample's loss is judged by: ``"ratio"`` to the bank's mean, which was published; its
            ``"quantile"``; or ``"record"``, its own running mean.
        z0: :math:`z_0`, in standard deviations; infinity is off. Default: 1 of records, 1.64 of quantiles *(our
            choice: one in 20 usual losses lies below)*; with ``eta`` none.
        delta: :math:`\delta`; records are compared with their median; infinity is off. 0.3 served well *(our choice)*.
            Of ``z0`` and ``delta`` one is given at most.
        eta: :math:`\eta`; samples are weighted by their records instead of left out; 0 is off. With ``delta`` or
            ``z0``, those are weighted down whose records lie below that limit: 0.2 with ``z0`` 1 against unseen images,
            0.1 with ``delta`` 0.3 *(our choices)*. Alone, all records are made alike: 0.03 *(our choice)*.
        weigh: What the weights of ``eta`` act on: ``"losses"``; or ``"draws"``, from the second epoch on, which needs a
            training set that is read through :class:`~lightning_iet.data.DrawnByWeight`. Data modules of this package
            do that by themselves. The default is then ``eta`` 0.2 with ``z0`` 1 against unseen images, 0.1 with
            ``delta`` 0.3 among training samples.
        min_weight: :math:`w_\min`, in (0, 1] *(our choice: 0.02)*.
        record_decay: :math:`\rho`, in [0, 1) *(our choice: 0.8)*.
        sample_index: Where batches hold the index of each sample in the training set: the key of a dict, or the
            position in a tuple. Default: the entry ``"index"``, or the last tensor of integers, of samples that are
            known to carry it.
        decay: :math:`d` of the bank, in [0, 1). Default: 0.8, which was published; of unseen images, and of the
            statistics of log-losses, 0.9 *(our choice)*.
        num_timesteps: Number of timesteps of the noise schedule, T; integer timesteps lie in [0, T).
        num_bins: Number of entries of the bank. Default: ``num_timesteps``; of unseen images, which are few, and of the
            other criteria at most 50 *(our choice)*.
        reference: Whose losses samples are compared with: ``"training"`` (``"train"`` is the same), those of the
            training samples; ``"held_out"``, those of the
            data module's ``anchor_set``, else of some of its validation images; ``"other_shards"``, those of the
            samples that the shard at work has not trained on since the last averaging.
        normalize: What the sum of the kept losses is divided by: ``"kept"``, their number; ``"batch"``, the size of the
            batch, so that the step shrinks as samples drop out. Default: ``"kept"``, and ``"batch"`` for ratios to
            unseen images. With weights, their sum takes the place of the number.
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
        counts: Draws and skips by sample, while a run lasts and after it; None where samples have no known index.
        records: Records and weights by sample; None with another criterion.
        is_relative: Whether records are compared with their median, not with a fixed limit.
        draws: What samples of this epoch are drawn by; None where weights do not act on draws.

    Raises:
        ValueError: If an argument is out of range; before the first step, if there are no unseen images, or no index
            that is needed; or, at the first batch, if no way leads to the losses, keys are missing, shapes disagree,
            timesteps or indices are out of range, or ``training_step`` cannot be called on unseen images.
        TypeError: If an argument is no number; at the first batch, if what should be a tensor is something else; or
            without a Lightning trainer.

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
    counts: SampleCounts | None = None
    records: SampleRecords | None = None
    draws: SampleDraws | None = None
    needs_samples: bool = False  # whether another callback needs the counts
    augmentation: Augmentation | None = None
    replicas: dist.ProcessGroup | None = None  # the processes that train this shard together, whose batches are one
    _batch_size: int = 0
    _num_samples: int = 0  # of the last batch before the announcement
    _num_losses: int = 0  # of that batch, and of all later ones
    _num_processes: int = 1
    _training_set: TrainingSet | None = None
    batch_index: Tensor | None = None  # the sample of each row of the batch at work, (B,)
    _deferred: Tensor | None = None
    _table: DrawTable | None = None  # what the loader's workers read
    _resumed_epoch: int = 0
    _is_at_start: bool = True
    _skips_epoch_end: bool = False  # whether a resumed run goes on behind the hooks of the end of an epoch
    _is_first_process: bool = True
    _is_over: bool = False  # whether the sums of the epoch are those of all processes, since training has ended
    _kept: Tensor | None = None  # which samples of the last batch stayed in the loss, boolean, (B,)
    verdict: Selection | None = None  # about the batch at work, if it was judged before its step
    sample_group: dist.ProcessGroup | None = None

    def __init__(
        self,
        threshold: float = 0.5,
        *,
        criterion: Criterion = "ratio",
        z0: float | None = None,
        delta: float | None = None,
        eta: float | None = None,
        weigh: Weigh = "losses",
        min_weight: float = 0.02,
        record_decay: float = 0.8,
        sample_index: int | str | None = None,
        decay: float | None = None,
        num_timesteps: int = 1000,
        num_bins: int | None = None,
        reference: Reference = "training",
        normalize: Literal["kept", "batch"] | None = None,
        reference_every: int = 6,
        reference_batch_size: int | None = None,
        reference_images: int | None = None,
        denoiser: str | None = None,
        timestep: str | None = None,
    ) -> None:
        super().__init__()
        check_kinds(float, z0=z0, delta=delta, eta=eta, min_weight=min_weight, record_decay=record_decay)
        counts = {
            "reference_every": reference_every,
            "reference_batch_size": reference_batch_size,
            "reference_images": reference_images,
        }
        check_kinds(int, num_timesteps=num_timesteps, num_bins=num_bins, **counts)
        check_choice("criterion", criterion, get_args(Criterion))
        check_choice("reference", reference, get_args(Reference))
        check_choice("normalize", normalize, (None, "kept", "batch"))
        check_choice("weigh", weigh, get_args(Weigh))
        if weigh == "draws" and criterion != "record":
            raise ValueError(
                f"Argument `weigh` expected 'losses' with criterion={criterion!r}, which has no weights, but got"
                " 'draws'. Use criterion='record'."
            )
        for name, number in counts.items():
            if number is not None and number < 1:
                raise ValueError(
                    f"Argument `{name}` expected at least 1, but got {number}. Leave it out for the default."
                )
        _check_record(criterion, z0=z0, delta=delta, eta=eta, min_weight=min_weight, record_decay=record_decay)
        is_ratio, is_anchored = criterion == "ratio", reference not in ("training", "train")
        if weigh == "draws" and eta is None:
            eta = 0.2 if is_anchored else 0.1
            if z0 is None and delta is None:
                z0, delta = (1.0, None) if is_anchored else (None, 0.3)
        decay = (0.8 if is_ratio and not is_anchored else 0.9) if decay is None else decay
        _check_arguments(threshold, decay, num_timesteps, num_bins)
        self.threshold = threshold
        self.criterion = criterion
        self.z0 = (1.64 if criterion == "quantile" else 1.0) if z0 is None else z0
        self.delta = delta
        self.eta = eta
        self.is_relative = delta is not None or (eta is not None and z0 is None)
        self.weigh: Weigh = weigh
        self.min_weight = min_weight
        self.record_decay = record_decay
        self.sample_index = sample_index
        self.decay = decay
        self.num_timesteps = num_timesteps
        self.denoiser = denoiser
        self.timestep = timestep
        self.reference = "training" if reference == "train" else reference
        self.normalize = normalize or ("batch" if is_anchored and is_ratio else "kept")
        if num_bins is None and (is_anchored or not is_ratio):
            num_bins = min(50, num_timesteps)
        self.bins = TimestepBins(num_timesteps, num_bins)
        self.bank = torch.zeros(self.bins.num_bins)
        self.log_losses = None if is_ratio else LogLossStatistics.empty(self.bins.num_bins)
        self.epoch_statistics = TimestepStatistics(self.bins.num_bins)
        self.run_statistics = TimestepStatistics(self.bins.num_bins)
        self.gap_history = GapHistory()
        self._weights = dict[int, list[float]]()  # by the epoch after which: their mean, and that of the lowest tenth
        self.source = LossSource()  # what the losses are looked for in; before the first step, maybe several places
        self._reference: ReferenceLosses | None = None  # of unseen images; of training images, nothing is measured
        if is_anchored:
            self._reference = ReferenceLosses(
                self.reference, every=reference_every, batch_size=reference_batch_size, num_images=reference_images
            )
        self._stack = ExitStack()
        self._saved_samples: dict[str, Tensor] = {}
        self._members: dict[int | None, Tensor] = {}
        self._is_first_batch = True
        self._is_announced = False
        self._num_steps = 0
        self._renewed_at = 0  # steps of this run before samples were last drawn by weight

    @property
    def is_off(self) -> bool:
        """Whether the loss is left as it is; statistics and counts are recorded all the same."""
        if self.criterion == "ratio":
            return self.threshold == 0
        return self.eta == 0 or (self.delta == inf if self.is_relative else self.z0 == inf)

    # --- the run -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and move to the module's device before a checkpoint is read."""
        if stage != "fit":
            return
        _check_trainer(trainer, self)
        self._resumed_epoch = 0
        inner = inner_datamodule(trainer)
        if self.draws_by_weight and isinstance(inner, ImageDataModule):
            inner.draws = DrawTable()
            if isinstance(trainer.datamodule, ShardedDataModule):  # type: ignore[attr-defined]
                trainer.datamodule.forget_prepared()  # type: ignore[attr-defined]
        # The module itself is moved only after this hook. Copies: tensors handed to spawned processes share memory.
        device, self.shard = trainer.strategy.root_device, None
        self.bank = self.bank.to(device, copy=True)
        if self.log_losses is not None:
            self.log_losses = LogLossStatistics(*(values.to(device, copy=True) for values in self.log_losses))
        self.bins.to(device)
        self.epoch_statistics = self.epoch_statistics.copy_to(device)
        self.run_statistics = self.run_statistics.copy_to(device)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find out at which epoch the run goes on, and whether at its beginning."""
        self._resumed_epoch = next_epoch(checkpoint)
        self._is_at_start = took_last_batch(checkpoint)
        self._skips_epoch_end, self._is_first_process = skips_epoch_end(checkpoint), trainer.is_global_zero

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the held-out images; before any sample is read, say which ones a resumed epoch reads."""
        if self._reference is not None:
            self._reference.choose_held_out(trainer)
        if self.draws_by_weight:
            self._table = self._find_table(trainer)
            self._restore_draws(self._table)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hook the module where its losses are."""
        self._is_first_batch, self._is_announced, self._num_steps, self._renewed_at = True, False, 0, 0
        self._num_processes = trainer.world_size
        self.verdict, self._deferred = None, None  # of a run that an exception has ended, without a teardown
        self._is_over = False
        self._open_samples(trainer, pl_module)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        try:
            self.source = self._stack.enter_context(
                open_losses(
                    pl_module,
                    self.select,
                    denoiser=self.denoiser,
                    timestep=self.timestep,
                    several_optimizers=len(trainer.optimizers) > 1,
                    scale=None if scaler is None else scaler.scale,
                )
            )
            if self._reference is not None:
                self._reference.open(trainer, pl_module, self.source)
        except UnsupportedModule as error:
            self._refuse_unless_off(error)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record what the module computes from now on."""
        self._num_steps += 1
        if not self._is_announced:
            self._num_samples, self._num_losses = count_samples(trainer, batch), 0
        self.batch_index = None if self.counts is None else read_index(batch, self.sample_index)
        if self._reference is not None:
            self._reference.begin_step(batch_idx)
        self.losses.begin_step()
        self.verdict = None
        if self.augmentation is not None:
            self.augmentation.begin_step(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Decide about the batch; refuse a module whose losses were not found: AGC would do nothing."""
        try:
            self.losses.before_backward(loss)
        except UnsupportedModule as error:
            self._refuse_unless_off(error)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure reference images: the graph of the batch is gone, and the optimizer has yet to step."""
        if self._reference is not None and self._reference.is_due():
            shard = trainer.global_rank if self.shard is None else self.shard
            self.learn_reference(*self._reference.measure(self._batch_size, shard=shard, replica=self.replica))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop recording; log once where the losses come from."""
        self.losses.end_step()
        if not self._is_announced and self.losses.description:
            self._is_announced = True
            message = f"AntiGradientControl: {self.losses.description}; {self.bins.describe()}. {self.losses.caution}"
            rank_zero_info(message.strip())
            if 0 < self._num_losses < self._num_samples:
                rank_zero_warn(
                    f"AntiGradientControl expected a loss for each of the {self._num_samples} samples of a batch, but"
                    f" got {self._num_losses}. If the step joins samples (the mean of some, say), those of one loss are"
                    " left out together, and copies of a single image are hardly noticed: let it compute one loss per"
                    " sample. If it drops samples on purpose, all is well."
                )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch of all processes to the run, and log its skip rate."""
        if self._is_first_batch and self._num_steps:
            raise ValueError(
                f"AntiGradientControl expected losses to learn from, but none of {self._num_steps} steps had a backward"
                f" pass: {type(pl_module).__name__}.training_step returned None each time. Return a loss."
            )
        epoch = self._of_all_processes(trainer)
        gap = None if self._reference is None else GapHistory.of(epoch)
        skip_rate, num_outside = epoch.skip_rate(), int(epoch.out_of_range)
        if num_outside or not is_cut_short(trainer):
            self._add_to_run(epoch)
        if num_outside:  # equal on all processes: none is left waiting for the others
            raise self.bins.range_error(f"{num_outside} others in this epoch")
        # Equal on all processes; a sync would be one that a progress bar starts on the first process alone.
        pl_module.log(self._prefix(trainer) + "skip_rate", skip_rate, prog_bar=True)
        if gap is not None:
            log_gap(trainer, pl_module, gap, prefix=self._prefix(trainer))
        self.share_samples()
        self._log_samples(trainer, pl_module)
        self._draw_next_epoch(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the hooks; plot the losses of training and reference images."""
        self._stack.close()
        self.epoch_statistics, self._is_over = self._of_all_processes(trainer), True  # of an epoch that was broken off
        epochs = None if self.draws is None else int(self.draws.draw_clock[1])
        is_short = epochs == 0 or (epochs == 1 and self._num_steps == self._renewed_at)
        if is_short and not is_trial(trainer):
            rank_zero_warn(
                "AntiGradientControl expected more than one epoch for weigh='draws', the first of which draws each"
                " sample once, but this run had no second one, and nothing was changed. Use weigh='losses', or train"
                " longer."
            )
        self.share_samples()
        self._num_processes = 1  # what is read now needs no other process
        if self._training_set is not None and self.counts is not None and trainer.is_global_zero:
            write_sample_report(
                trainer, self._training_set, self.counts, self.records, suffix=self._prefix(trainer).split("/")[1:-1]
            )
        if self._reference is not None and trainer.is_global_zero:
            plot_gap(trainer, self._gaps_so_far(), prefix=self._prefix(trainer), num_timesteps=self.num_timesteps)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the hooks, and let the data be read as they are.

        The exception may be this process's alone: a checkpoint that is written now must not wait for the others. That
        of SIGTERM is raised on all.
        """
        self._stack.close()
        if not isinstance(exception, SIGTERMException):
            self._num_processes = 1
        self._close_draws(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the hooks after an exit by which the other hooks were not called; add an epoch that was broken off.

        Only now: a checkpoint of the end of the run may go on within that epoch.
        """
        self._stack.close()
        if stage == "fit" and self.epoch_statistics.seen.any():
            self._add_to_run(self.epoch_statistics)
        if self._reference is not None:
            self._reference.close()
        self._training_set, self._members, self.batch_index, self._num_processes = None, {}, None, 1
        self.verdict, self._deferred = None, None
        self._close_draws(trainer)

    def _of_all_processes(self, trainer: pl.Trainer) -> TimestepStatistics:
        """A copy of the epoch's sums, over all processes. Takes part on every process."""
        epoch = self.epoch_statistics.copy_to(self.epoch_statistics.seen.device)
        for buffer in epoch.buffers():
            buffer.copy_(trainer.strategy.reduce(buffer, reduce_op="sum"))
        return epoch

    def _add_to_run(self, epoch: TimestepStatistics) -> None:
        """Add an epoch of all processes to the run, and begin the next one."""
        self.run_statistics.add(epoch)
        self.gap_history.add(epoch)
        self.epoch_statistics.reset()

    def _refuse_unless_off(self, error: UnsupportedModule) -> None:
        """Refuse an unsupported module only if AGC is on; else say that nothing is recorded."""
        if not self.is_off or self._reference is not None:
            raise error
        rank_zero_info(f"AntiGradientControl is off, and records nothing: {error}")
        self._stack.close()
        self.source, self._is_first_batch = LossSource(), False

    def _prefix(self, trainer: pl.Trainer) -> str:
        """Beginning of the names of what is logged."""
        several = len(find_callbacks(trainer, AntiGradientControl)) > 1
        return f"agc/{self.denoiser}/" if several else "agc/"

    # --- the method --------------------------------------------------------------------------------------------------

    def select(self, sample_loss: Tensor, timesteps: Tensor) -> Selection | None:
        """Decide about a training batch, one loss and timestep per sample, (B,), and let the bank learn from it.

        Returns:
            The samples to keep; None to leave the loss untouched.
        """
        verdict, self.verdict = self.verdict, None
        return self.judge(sample_loss, timesteps) if verdict is None else verdict

    def judge(self, sample_loss: Tensor, timesteps: Tensor) -> Selection | None:
        """Likewise, whatever :attr:`verdict` says: of losses that may be others than those of the step."""
        check_batch(sample_loss, timesteps, name="sample_loss", continuous=True)
        losses = sample_loss.detach()
        timesteps = timesteps.detach().to(losses.device)
        index = self._index_of(losses)
        if self.replicas is not None:
            losses, timesteps = gather_rows(losses, self.replicas), gather_rows(timesteps, self.replicas)
            index = None if index is None else gather_rows(index, self.replicas)
        if self._is_first_batch:
            self._inspect(losses, timesteps, index)
            self._is_first_batch = False
        self.epoch_statistics.out_of_range.add_(self.bins.out_of_range(self._own(timesteps)))
        bins = self.bins.index(timesteps)
        augmented = None
        if self.augmentation is not None and index is not None:
            augmented = self.augmentation.is_augmented(index)
            losses = torch.where(augmented, torch.nan, losses)  # kept, and counted nowhere, like a broken loss
        keep, weights = self._keep(losses, bins, index, augmented)
        kept, losses = self._own(keep), self._own(losses)
        self._kept, self._batch_size = kept, len(losses)
        self._num_losses += self._batch_size
        self.epoch_statistics.update(losses, self._own(bins), keep=kept)
        if self.counts is not None and index is not None:
            exempt = None if augmented is None else self._own(augmented)
            self.counts.update(self._own(index), keep=kept, exempt=exempt)
        if self.is_off:
            return None
        if self._deferred is not None:
            keep = keep & ~self._deferred
            kept = self._own(keep)
        selection = Selection(kept, weights=None if weights is None else self._own(weights))
        if self.normalize == "batch":
            return selection._replace(divisor=self._batch_size)
        if self.replicas is None:
            return selection
        # DDP takes the mean of the replicas' gradients: each divides by its share of the number that all keep.
        total = keep.sum().clamp(min=1) if weights is None else weights.sum()
        return selection._replace(divisor=total / dist.get_world_size(self.replicas))

    def _keep(
        self, losses: Tensor, bins: Tensor, index: Tensor | None, augmented: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tell which samples to keep, and their weights, (B,); compared with what was known before this batch."""
        learns = self._reference is None
        if self.log_losses is None:
            keep = keep_mask(losses, bins, self.bank, self.threshold, validate_args=False)
            if self.augmentation is not None and index is not None and augmented is not None:
                self._deferred = self.augmentation.judge(index, losses, bins, self.bank, augmented=augmented)
            if learns:
                self.bank.copy_(update_bank(self.bank, losses, bins, self.decay, validate_args=False))
            return keep, None
        scores = standardized_losses(losses, bins, self.log_losses, validate_args=False)
        if learns:
            self._learn_log_losses(losses, bins)
        absent = ~(losses.isfinite() & (losses > 0))
        if self.records is None or index is None:
            return keep_by_record(scores, -self.z0) | absent, None
        rows = slice(None)
        if self.sample_group is not None:
            rows = slice(dist.get_rank(self.sample_group), None, dist.get_world_size(self.sample_group))
            index, scores, absent = (gather_rows(values, self.sample_group) for values in (index, scores, absent))
        record = self.records.update(index, scores, self.record_decay, absent=absent)
        limit: float | Tensor = -self.z0
        if self.is_relative:
            limit = self.records.typical(self._shard_members()) - (self.delta or 0)
        if self.eta is None:
            return (keep_by_record(record, limit) | absent)[rows], None
        rate = self.eta if self.draws is None else self.eta * self.draws.pace(index)
        weights = self.records.update_weights(index, record, limit, rate, min_weight=self.min_weight, absent=absent)
        return torch.ones_like(absent)[rows], weights[rows] if self.draws is None else None

    def learn_reference(self, losses: Tensor, timesteps: Tensor) -> None:
        """Let the bank learn from losses and timesteps of reference images, both (n,), those of all replicas alike."""
        check_batch(losses, timesteps, name="sample_loss", continuous=True)
        bins = self.bins.locate(timesteps.to(losses.device))
        self.epoch_statistics.update_unseen(losses, bins)
        if self.replicas is not None:
            losses, bins = gather_rows(losses, self.replicas), gather_rows(bins, self.replicas)
        if self.log_losses is None:
            self.bank.copy_(update_anchored_bank(self.bank, losses, bins, self.decay, validate_args=False))
        else:
            self._learn_log_losses(losses, bins)

    def _learn_log_losses(self, losses: Tensor, bins: Tensor) -> None:
        assert self.log_losses is not None  # noqa: S101
        updated = update_log_loss_statistics(self.log_losses, losses, bins, self.decay, validate_args=False)
        for values, news in zip(self.log_losses, updated, strict=True):
            values.copy_(news)

    # --- samples -----------------------------------------------------------------------------------------------------

    def _open_samples(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Make the tables by sample, where a batch tells which samples it holds."""
        self.counts = self.records = self.draws = None
        needed = self.criterion == "record" or self.needs_samples
        data = training_set(trainer.train_dataloader)
        if data is None or not (data.yields_index or self.sample_index is not None):
            if needed:
                what = "a stream" if data is None else f"samples of {type(data.dataset).__name__} without one"
                raise ValueError(
                    f"AntiGradientControl expected batches with the index of each sample, for criterion='record' or"
                    f" another callback, but got {what}. Wrap the training set in lightning_iet.data.WithIndex, or name"
                    " the entry of the batch with `sample_index`."
                )
            return
        self._training_set, sampler = data, data.sampler
        is_own = self.shard is None and trainer.world_size > 1 and not isinstance(sampler, ShardSampler)
        if needed and is_own and not isinstance(sampler, DistributedSampler):
            raise ValueError(
                "AntiGradientControl expected processes that share one training set, for criterion='record' or another"
                " callback, but each reads data of its own. Use a ShardedDataModule, or let Lightning make the sampler."
            )
        self.sample_group = dist.group.WORLD if is_own and needed else None
        self.counts = SampleCounts(len(data))
        if self.criterion == "record":
            self.records = SampleRecords(len(data))
        if self.draws_by_weight:
            self.draws = self._open_draws(trainer, data)
        for table in (self.counts, self.records, self.draws):
            if table is not None:
                self._restore(table)
                table.to(self.bank.device)
        self._saved_samples = {}

    def _restore(self, table: SampleCounts | SampleRecords | SampleDraws) -> None:
        """Put the rows of a checkpoint into a table."""
        saved = {name: self._saved_samples[name] for name in table.state_dict() if name in self._saved_samples}
        for name, values in saved.items():
            shape = table.state_dict()[name].shape
            if values.shape != shape:
                raise _size_error(values.shape[-1], shape[-1])
        table.load_state_dict(saved, strict=False)

    # --- draws by weight ---------------------------------------------------------------------------------------------

    @property
    def draws_by_weight(self) -> bool:
        """Whether weights act on how often a sample is drawn."""
        return self.weigh == "draws" and not self.is_off

    def _find_table(self, trainer: pl.Trainer) -> DrawTable:
        """The table by which the loader reads samples."""
        inner = inner_datamodule(trainer)
        if isinstance(inner, ImageDataModule) and inner.draws is not None:
            return inner.draws
        return find_wrapper(
            trainer,
            DrawnByWeight,
            who="AntiGradientControl with weigh='draws'",
            remedy="Wrap it: DrawnByWeight(WithIndex(dataset)); or use weigh='losses'.",
        ).table

    def _restore_draws(self, table: DrawTable) -> None:
        """Let the loader of a resumed run read what it would have read."""
        table.clear()
        saved = self._saved_samples
        if "draw_table" not in saved:
            return
        size = len(saved["draw_table"])
        if len(table.sample) not in (0, size):
            raise _size_error(size, len(table.sample))
        draws, records = SampleDraws(size), SampleRecords(size)
        self._restore(draws)
        if self._is_at_start and self._resumed_epoch > int(draws.draw_clock[1]):
            # A checkpoint of the last step of an epoch: Lightning does not call the hooks of its end again.
            self._restore(records)
            draws.renew(records, epochs_ended=self._resumed_epoch)
            self._saved_samples = saved | draws.state_dict()
        table.allocate(len(draws.draw_table))
        table.write(draws.draw_table)

    def _close_draws(self, trainer: pl.Trainer) -> None:
        """Let each sample be read in its own place again."""
        if self._table is None:
            return
        self._table.clear()
        self._table, inner = None, inner_datamodule(trainer)
        if isinstance(inner, ImageDataModule):
            inner.draws = None

    def _open_draws(self, trainer: pl.Trainer, data: TrainingSet) -> SampleDraws:
        """Check that the loader reads by the table, and make what it is written from."""
        read = layers(trainer.train_dataloader)
        outer = next(layer for layer in read if not isinstance(layer, Seeded | SeededSamples))
        if not isinstance(outer, DrawnByWeight) or outer.table is not self._table or len(outer) != len(data):
            raise ValueError(
                "AntiGradientControl expected the training loader to read lightning_iet.data.DrawnByWeight, outermost,"
                " for weigh='draws', but it reads another data set. Keep one DrawnByWeight(WithIndex(dataset)) in the"
                " data module, and return a loader of it."
            )
        seed = data.sampler.seed if isinstance(data.sampler, ShardSampler) else torch.initial_seed() % 2**63
        draws = SampleDraws(len(data), seed=int(trainer.strategy.broadcast(seed)))
        if isinstance(data.sampler, ShardSampler):
            draws.draw_group.copy_(to_assignment(data.sampler.shards, len(data)))
        return draws

    def _draw_next_epoch(self, trainer: pl.Trainer) -> None:
        """Draw the samples of the next epoch, if this one has come to its end."""
        if self.draws is None or self.records is None or self._table is None:
            return
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._renewed_at = self._num_steps
            self.draws.renew(self.records, epochs_ended=trainer.current_epoch + 1)
            self.draws.share(self._num_processes)
            self._table.write(self.draws.draw_table.cpu())

    # --- the index of a sample ---------------------------------------------------------------------------------------

    def _index_of(self, losses: Tensor) -> Tensor | None:
        """The sample of each loss, (B,), on their device; None where samples are not counted."""
        if self.counts is None:
            return None
        index = self.batch_index
        if index is not None and len(index) == len(losses):
            return index.to(losses.device)
        found = "no index" if index is None else f"{len(index)} of them for {len(losses)} losses"
        message = f"AntiGradientControl expected a batch with one index for each loss, but got {found}."
        if self.records is not None or self.needs_samples:
            raise ValueError(
                f"{message} Return each sample's index from the data set, see lightning_iet.data.WithIndex."
            )
        rank_zero_info(f"{message} Skips are not counted by sample.")
        self.counts = None
        return None

    def _inspect(self, losses: Tensor, timesteps: Tensor, index: Tensor | None) -> None:
        """Look at the first batch on the host, and refuse what cannot be."""
        self.bins.inspect(timesteps)
        if self.log_losses is not None and bool((losses < 0).any()):
            raise ValueError(
                f"Argument `criterion` expected 'ratio' for losses that may be negative, which have no logarithm, but"
                f" got {self.criterion!r}. Use criterion='ratio', or return squared errors."
            )
        if index is None or self.counts is None:
            return
        values, size = index.cpu(), self.counts.own.shape[1]
        outside = values[(values < 0) | (values >= size)]
        if len(outside):
            raise self._range_error(int(outside[0]))
        members = self._shard_members()
        checked = self.needs_samples or self.draws is not None
        if members is not None and checked and not bool(torch.isin(values, members.cpu()).all()):
            raise ValueError(
                "AntiGradientControl expected each sample's index in the data set that is split into shards, but got"
                f" indices of others for shard {self.shard}. Let lightning_iet.data.WithIndex be the outermost wrapper."
            )

    def _range_error(self, found: object) -> ValueError:
        size = self.counts.own.shape[1] if self.counts is not None else 0
        return ValueError(
            f"Argument `sample_index` expected indices in [0, {size}), the size of the training set, but got {found}."
            " Name the entry of the batch that holds them, or use lightning_iet.data.WithIndex."
        )

    def _shard_members(self) -> Tensor | None:
        """The samples of the shard at work, on the device; None without shards."""
        sampler = None if self._training_set is None else self._training_set.sampler
        if self.shard is None or not isinstance(sampler, ShardSampler):
            return None
        if self.shard not in self._members:
            self._members[self.shard] = sampler.shards[self.shard].to(self.bank.device)
        return self._members[self.shard]

    def reshard(self) -> None:
        """Forget which samples the shards hold: they were exchanged."""
        self._members = {}

    def own_samples(self) -> Tensor | None:
        """The samples that this process alone trains on, on the device; None where all processes hold the same tables.

        Of the replicas of a shard, which hold the same, the first one owns them.
        """
        sampler = None if self._training_set is None else self._training_set.sampler
        if not isinstance(sampler, ShardSampler):
            return None
        shards = [] if self.replica else [sampler.shards[shard] for shard in sampler.hosted]
        return torch.cat([torch.zeros(0, dtype=torch.long), *shards]).to(self.bank.device)

    def share_samples(self) -> None:
        """Let every process know what all of them have seen of each sample. Takes part on every process."""
        if self.counts is not None:
            self.counts.share(self._num_processes)
        if self.records is not None:
            self.records.share(self._num_processes, self.own_samples())

    def _log_samples(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log the skip rate of the most skipped hundredth of all samples, and the lowest records."""
        if self.counts is None:
            return
        outside = int(trainer.strategy.reduce(self.counts.out_of_range, reduce_op="sum"))
        self.counts.out_of_range.zero_()
        if outside:  # equal on all processes: none is left waiting for the others
            raise self._range_error(f"{outside} others in this epoch")
        if self.is_off:
            return
        module.log(self._prefix(trainer) + "most_skipped", self.counts.most_skipped())
        if self.records is not None:
            drawn = self.records.record[self.records.drawn]
            module.log(self._prefix(trainer) + "lowest_record", extreme_mean(drawn, 0.01, largest=False))
            if self.eta is not None:
                weights = self.records.weights()[self.records.drawn]
                module.log(self._prefix(trainer) + "weight", weights.mean())
                lowest = extreme_mean(weights, 0.1, largest=False)
                self._weights[trainer.current_epoch + 1] = [float(weights.mean()), float(lowest)]

    def counts_since_exchange(self) -> tuple[Tensor, Tensor]:
        """Draws of each sample, and those left out, since samples were last exchanged; both (n,), on the CPU.

        Counts of other processes up to the last :meth:`share_samples`; before training begins, those of the checkpoint.
        """
        counts = self.counts
        if counts is None:
            counts = SampleCounts(self._saved_samples["shared"].shape[1])
            self._restore(counts)
        seen, skipped = counts.since_exchange()
        return seen.cpu(), skipped.cpu()

    def end_exchange(self) -> None:
        """Begin the counts since the last exchange anew."""
        if self.counts is not None:
            self.counts.end_exchange()
        elif self._saved_samples:
            self._saved_samples["at_exchange"] = self._saved_samples["shared"].clone()

    def skip_rate_by_sample(self) -> Tensor:
        """Share of each sample's draws that were left out so far, shape (n,), on the CPU; NaN where it was not drawn.

        With several processes, those of the others count up to the last finished epoch.

        Raises:
            ValueError: If samples were not counted: batches have no known index.
        """
        if self.counts is None:
            raise ValueError(
                "AntiGradientControl expected batches with the index of each sample, but has counted none. Wrap the"
                " training set in lightning_iet.data.WithIndex."
            )
        return self.counts.skip_rate().cpu()

    # --- shards and replicas -----------------------------------------------------------------------------------------

    @property
    def replica(self) -> int:
        """Which of the processes that train this shard together this one is."""
        return 0 if self.replicas is None else dist.get_rank(self.replicas)

    @property
    def own_rows(self) -> slice:
        """Which rows of a batch, gathered over the replicas of a shard, are this process's."""
        return slice(None) if self.replicas is None else slice(self.replica, None, dist.get_world_size(self.replicas))

    def _own(self, rows: Tensor) -> Tensor:
        """This process's rows; without replicas all of them, as they are, since cutting takes time in every step."""
        return rows if self.replicas is None else rows[self.own_rows]

    def shard_state(self) -> dict[str, Tensor]:
        """References to the tensors in which shards differ: the bank and the bins. They are updated in place."""
        log_losses = {} if self.log_losses is None else self.log_losses._asdict()
        steps = {} if self._reference is None else self._reference.shard_state()
        return {"bank": self.bank} | log_losses | self.bins.shard_state() | steps

    def load_shard_state(self, state: dict[str, Tensor]) -> None:
        """Put the tensors of another shard in place, by reference; ValueError if their number of bins is another."""
        if state["bank"].shape != self.bank.shape:
            raise ValueError(
                f"Argument `bank` expected shape {tuple(self.bank.shape)}, but got {tuple(state['bank'].shape)}."
                f" Set `num_timesteps` (or `num_bins`) of AntiGradientControl to {len(state['bank'])}, or train afresh."
            )
        self.bank = state["bank"]
        if self.log_losses is not None:
            self.log_losses = LogLossStatistics(*(state[name] for name in LogLossStatistics._fields))
        if "edges" in state:  # else a bank by itself: its bins are those at hand
            self.bins.load_shard_state(state)
        if self._reference is not None:
            self._reference.load_shard_state(state)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Name in a checkpoint; callbacks on two denoisers have one each."""
        return super().state_key if self.denoiser is None else self._generate_state_key(denoiser=self.denoiser)

    def state_dict(self) -> dict[str, Any]:
        """Bank, bins and statistics, and the tables by sample. Takes part on every process."""
        self.share_samples()
        epoch = self.epoch_statistics.copy_to(self.bank.device)
        if self._num_processes > 1:
            for buffer in epoch.buffers():
                dist.all_reduce(buffer)
        tables = [table.state_dict() for table in (self.counts, self.records, self.draws) if table is not None]
        samples = {name: values for table in tables for name, values in table.items()} or self._saved_samples
        return {
            **self.shard_state(),
            **({"criterion": self.criterion, "settings": self._settings()} if self.criterion != "ratio" else {}),
            **({"by_sample": samples} if samples else {}),
            "continuous": self.bins.continuous,
            "reference": self.reference,
            "seed": None if self._reference is None else self._reference.seed,
            "epoch_statistics": epoch.state_dict(),
            "run_statistics": self.run_statistics.state_dict(),
            "gaps": self.gap_history.state_dict(),
            **({"weights": {epoch: list(pair) for epoch, pair in self._weights.items()}} if self._weights else {}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; ValueError if it was saved with another number of bins."""
        saved = state_dict.get("reference", "train")
        saved = "training" if saved == "train" else saved
        if saved != self.reference:
            raise ValueError(
                f"Argument `reference` expected {saved!r}, with which the checkpoint was trained, but got"
                f" {self.reference!r}. Go on with the same reference, or train afresh."
            )
        if self._reference is not None:
            self._reference.seed = state_dict.get("seed")
        criterion = state_dict.get("criterion", "ratio")
        if criterion != self.criterion:
            raise ValueError(
                f"Argument `criterion` expected {criterion!r}, with which the checkpoint was trained, but got"
                f" {self.criterion!r}. Go on with the same criterion, or train afresh."
            )
        warn_of_changes("AntiGradientControl", state_dict.get("settings", {}), self._settings())
        self._saved_samples = state_dict.get("by_sample", {})
        names = self.shard_state().keys()
        self.load_shard_state({name: state_dict[name].to(self.bank.device, copy=True) for name in names})
        self.bins.continuous = state_dict["continuous"]
        # Not strict: checkpoints from before unseen images were counted have none.
        self.epoch_statistics.load_state_dict(state_dict["epoch_statistics"], strict=False)
        self.run_statistics.load_state_dict(state_dict["run_statistics"], strict=False)
        if "gaps" in state_dict:
            self.gap_history.load_state_dict(state_dict["gaps"])
        num_outside = int(self.epoch_statistics.out_of_range)
        if self._skips_epoch_end and self.epoch_statistics.seen.any():
            self._add_to_run(self.epoch_statistics)
        if self._skips_epoch_end or not self._is_first_process:  # the sums are those of all processes
            self.epoch_statistics.reset()
        if self._skips_epoch_end and num_outside:
            raise self.bins.range_error(f"{num_outside} others in the epoch of the checkpoint")
        self._weights = {epoch: list(pair) for epoch, pair in state_dict.get("weights", {}).items()}

    def _settings(self) -> dict[str, Any]:
        names = ("z0", "delta", "eta", "weigh", "min_weight", "record_decay", "is_relative")
        return {name: getattr(self, name) for name in names}

    # --- what the run was like ---------------------------------------------------------------------------------------

    @property
    def last_skip_rate(self) -> Tensor | None:
        """Share of the last batch that was left out, a scalar on the device; None before the first batch."""
        return None if self._kept is None else 1 - self._kept.float().mean()

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

    def weights_by_epoch(self) -> dict[int, list[float]]:
        """Return the weights of the training images, with ``eta``, by the epoch after which they are, 1 … .

        Returns:
            Two numbers in (0, 1]: the mean of all images, and the mean of the tenth that counts least.
        """
        return {epoch: list(pair) for epoch, pair in self._weights.items()}

    def gap(self) -> float:
        """How far training losses lie under those of unseen images, as a share of these; the mean over timesteps.

        Over the last tenth of the finished epochs, and of one that was broken off by the end of the run. 0: the model
        denoises its training images no better than unseen ones; 1: it has memorised them. NaN before the first epoch
        has ended, and without a reference to unseen images.
        """
        history = self._gaps_so_far() if self._is_over else self.gap_history
        num_rows = len(history.rows)
        return float(history.gap(max(1, num_rows // 10)).nanmean()) if num_rows else float("nan")

    def _gaps_so_far(self) -> GapHistory:
        """Of all epochs, one that was broken off among them; after the sums of all processes were taken."""
        history = GapHistory()
        history.load_state_dict(self.gap_history.state_dict())
        if self.epoch_statistics.seen.any():
            history.add(self.epoch_statistics)
        return history

    @property
    def losses(self) -> LossSource:
        """Where the losses of the module come from."""
        return self.source.active

    @property
    def unseen_images(self) -> ReferenceImages | None:
        """Where unseen images come from, while a run lasts; None without a reference to such."""
        return None if self._reference is None else self._reference.images

    def held_out_while_training(self, trainer: pl.Trainer) -> ReferenceImages | None:
        """Return :attr:`unseen_images`; of a run that does not train, the validation images that training takes."""
        return None if self._reference is None else self._reference.held_out_while_training(trainer)

    def _all_statistics(self) -> TimestepStatistics:
        """The finished epochs of all processes and the current one of this process."""
        total = self.run_statistics.copy_to(self.epoch_statistics.seen.device)
        total.add(self.epoch_statistics)
        return total


# --- bad input -------------------------------------------------------------------------------------------------------


def _size_error(saved: int, size: int) -> ValueError:
    return ValueError(
        f"Argument `ckpt_path` expected a checkpoint with counts of {size} samples, the size of the training set, but"
        f" got those of {saved}. Go on with the same training set."
    )


def _check_arguments(threshold: float, decay: float, num_timesteps: int, num_bins: int | None) -> None:
    """Refuse values that are out of range."""
    check_kinds(float, threshold=threshold)
    remedy = f"For a mem_ratio of {threshold} pass {1 / threshold:.3g}." if threshold > 1 else "0 switches AGC off."
    check_number("threshold", threshold, "[0, 1]", remedy)
    check_number("decay", decay, "[0, 1)", "0.8 is the published value.")
    if num_timesteps < 1:
        raise ValueError(
            f"Argument `num_timesteps` expected at least 1, but got {num_timesteps}. Pass that of the noise schedule."
        )
    if num_bins is not None and num_bins < 1:
        raise ValueError(f"Argument `num_bins` expected at least 1, but got {num_bins}. Leave it out for one each.")


def _check_record(
    criterion: str, *, z0: float | None, delta: float | None, eta: float | None, min_weight: float, record_decay: float
) -> None:
    """Refuse what does not fit the criterion, and values that are out of range."""
    given = {name: value for name, value in (("z0", z0), ("delta", delta), ("eta", eta)) if value is not None}
    allowed = {"ratio": (), "quantile": ("z0",), "record": ("z0", "delta", "eta")}[criterion]
    for name, value in given.items():
        if name not in allowed:
            raise ValueError(
                f"Argument `{name}` expected None with criterion={criterion!r}, which does not use it, but got {value}."
                " Use criterion='record'."
            )
        if not value >= 0:
            raise ValueError(f"Argument `{name}` expected a number ≥ 0, but got {value}. Leave it out for the default.")
    if "z0" in given and "delta" in given:
        raise ValueError(
            "Arguments `z0` and `delta` expected one of them, but got both. Choose: a fixed limit, or one below the"
            " median."
        )
    if eta == inf:
        raise ValueError("Argument `eta` expected a finite number, but got inf. 0 is off.")
    if eta and inf in (z0, delta):
        raise ValueError(
            "Arguments `z0` and `delta` expected finite numbers with `eta`, but got inf. Leave them out, or set eta=0"
            " for no weights."
        )
    check_number("min_weight", min_weight, "(0, 1]", "Leave it out for the default.")
    check_number("record_decay", record_decay, "[0, 1)", "Leave it out for the default.")


def _check_trainer(trainer: Any, callback: AntiGradientControl) -> None:
    """Refuse Fabric, strategies that spread one model over processes, and callbacks that are not told apart."""
    if isinstance(trainer, Fabric):
        raise TypeError(
            f"AntiGradientControl expected a Trainer, but got {type(trainer).__name__}. Call"
            " lightning_iet.functional.anti_gradient in the training loop, see docs/howto/plain-pytorch.md."
        )
    if is_sharded(trainer.strategy):
        raise ValueError(
            f"AntiGradientControl expected a strategy that keeps the model whole, but got"
            f" {type(trainer.strategy).__name__}. Use the strategy 'auto' or 'ddp'."
        )
    controls = [c for c in getattr(trainer, "callbacks", ()) if isinstance(c, AntiGradientControl)]
    drawing = [control for control in controls if control.draws_by_weight]
    if len(drawing) > 1:
        raise ValueError(
            f"AntiGradientControl expected one callback with weigh='draws', since samples are drawn by one table, but"
            f" got {len(drawing)}. Use weigh='losses' in the others."
        )
    names = [control.denoiser for control in controls]
    if len(names) > 1 and (None in names or len(set(names)) < len(names)):
        raise ValueError(
            f"AntiGradientControl expected `denoiser` to tell several callbacks apart, but got {names}."
            ' Name the denoiser of each: AntiGradientControl(denoiser="…").'
        )
