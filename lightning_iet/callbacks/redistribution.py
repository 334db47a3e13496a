"""Memory samples redistribution as a callback: it decides when; the exchange itself is in ``functional``."""

from collections import Counter
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iet.callbacks.anti_gradient_control import AntiGradientControl
from lightning_iet.callbacks.anti_gradient_control.reference import OtherShards
from lightning_iet.callbacks.parameter_averaging import ParameterAveragingCallback
from lightning_iet.data.samples import labels_of
from lightning_iet.data.shard_sampler import ShardSampler
from lightning_iet.data.sharding import ShardedDataModule
from lightning_iet.functional.checks import check_choice
from lightning_iet.functional.redistribution import (
    ExchangeTime,
    check_exchange,
    is_exchange_epoch,
    most_that_move,
    redistribute,
)
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.functional.sharding import from_assignment, to_assignment
from lightning_iet.utilities.checkpoints import next_epoch, warn_of_changes
from lightning_iet.utilities.lightning import Callback, find_callback, find_callbacks, num_shards_of

_SEED = 3  # tells these seeds from those of training steps


class Redistribution(Callback):
    r"""Move the samples that AGC skips most to the next shard, in the middle of each round (MSR of IET-AGC+).

    A sample that its shard's model knows well is left out by anti-gradient control again and again. In the next shard
    of the ring it meets a model that has not trained on it since the last averaging. How samples are chosen is said at
    :func:`~lightning_iet.functional.redistribution.redistribute`: of each shard equally many, at most a ``fraction``
    of it, most skipped since the last exchange first; all at once, so that sizes do not change.

    Method: Guan, Wu, Huang, Liu, Miao, Yang, *Redistribute Ensemble Training for Mitigating Memorization in Diffusion
    Models*, https://arxiv.org/abs/2502.09434, and the authors' code.

    It needs :class:`AntiGradientControl`, whose batches carry the index of each sample (our data modules do; else
    :class:`~lightning_iet.data.WithIndex`), :class:`ParameterAveragingCallback` with 2 or more shards, and
    :class:`~lightning_iet.data.ShardedDataModule`. An exchange takes effect at an epoch boundary: at the end of the
    first epoch that reaches the middle of a round *(our choice: no sample is read twice or never in an epoch)*. It
    depends on the counts of all processes and not on their number, and a resumed run exchanges what an uninterrupted
    one would. With ``reference="other_shards"``, a sample that moved is no unseen image for its former shard until the
    next averaging.

    Logged at an exchange: ``agc/moved``, the number of samples that moved; ``redistribution/moved_share``, the share of
    all samples that have moved at least once; ``redistribution/skip_rate_before``, the mean skip rate of those that
    move, and from the second exchange on ``redistribution/skip_rate_after``, that of those that moved last, in their
    new shard. ``skips.csv`` has the shard of each sample in the end.

    Args:
        fraction: Largest share of a shard that moves, in [0, 0.5]; 0.25 was published. 0 is off: nothing is changed.
        at: ``"half_round"``, in the middle of each round, which was published; or ``"round"``, at its end.
        min_skips: Samples that were skipped less often stay *(our choice: 1; published: 0, as many move, whatever they
            were skipped)*.
        within: ``"class"`` exchanges within each class, so that class counts of shards do not change; ``"shard"``
            without regard to classes, which was published. Default: ``"class"`` where the split is stratified by
            labels *(our choice)*.
        choose: ``"most_skipped"``; or ``"random"``, as many at random: the control that shows whether skips matter.

    Raises:
        ValueError: If an argument is out of range; before the first step, if what it needs is missing.

    Example:
        >>> from lightning_iet import AntiGradientControl, ParameterAveragingCallback
        >>> averaging = ParameterAveragingCallback(num_shards=4, every_n_train_steps=2000)
        >>> callbacks = [AntiGradientControl(threshold=0.8), averaging, Redistribution(fraction=0.25)]
    """

    def __init__(
        self,
        fraction: float = 0.25,
        *,
        at: ExchangeTime = "half_round",
        min_skips: int = 1,
        within: Literal["class", "shard"] | None = None,
        choose: Literal["most_skipped", "random"] = "most_skipped",
    ) -> None:
        super().__init__()
        check_exchange(fraction, min_skips)
        check_choice("at", at, get_args(ExchangeTime))
        check_choice("within", within, ("class", "shard", None))
        check_choice("choose", choose, ("most_skipped", "random"))
        self.fraction = fraction
        self.at: ExchangeTime = at
        self.min_skips = min_skips
        self.within = within
        self.choose = choose
        self._forget()

    def _forget(self) -> None:
        """Begin with the initial split, of a run that nothing is known of yet."""
        self._assignment: Tensor | None = None  # shard of each sample, (n,), int16; None = the initial split
        self._moves: Tensor | None = None  # how often each sample has moved, (n,), int16
        self._last_moved: Tensor | None = None  # which samples moved last
        self._trained: Tensor | None = None  # see OtherShards, (K, n)
        self._epochs_ended = 0
        self._resumed_epoch: int | None = None
        self._is_loaded = False
        self._labels: Tensor | None = None
        self._is_stratified = False
        self._num_samples = 0
        self._averaging: ParameterAveragingCallback | None = None
        self._controls: list[AntiGradientControl] = []

    # --- before training ---------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before the data are read."""
        if stage != "fit":
            return
        self._forget()
        if self.fraction == 0:
            return
        self._averaging = find_callback(trainer, ParameterAveragingCallback)
        self._controls = find_callbacks(trainer, AntiGradientControl)
        if self._averaging is None or not self._controls:
            missing = "a ParameterAveragingCallback" if self._averaging is None else "an AntiGradientControl"
            raise ValueError(
                f"Redistribution expected {missing} among the trainer's callbacks, but got none. Add one, or switch"
                " it off with fraction=0."
            )
        if any(control.draws_by_weight for control in self._controls):
            raise ValueError(
                "Redistribution expected an AntiGradientControl that leaves samples out, but got weigh='draws', which"
                " draws known samples less often and leaves none out. Switch one of them off: fraction=0, or eta=0."
            )
        check_exchange(self.fraction, self.min_skips, num_shards_of(trainer, self._averaging))
        if not isinstance(getattr(trainer, "datamodule", None), ShardedDataModule):
            raise ValueError(
                "Redistribution expected a ShardedDataModule, whose samples can change their shard, but got data that"
                " each process reads for itself. Use ShardedDataModule(datamodule, num_shards=…)."
            )
        for control in self._controls:
            control.needs_samples = True
        if all(control.is_off for control in self._controls):
            rank_zero_warn(
                "Redistribution moves nothing: AntiGradientControl is off and skips no sample. Set --agc.threshold."
            )
        if self.at == "half_round" and self._averaging.every_n_epochs == 1:
            rank_zero_info("Redistribution: a round of one epoch has no epoch boundary inside: it ends with one.")

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find out at which epoch the run goes on."""
        self._resumed_epoch = next_epoch(checkpoint)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the data restore the shards of a checkpoint when their loader is made."""
        datamodule = getattr(trainer, "datamodule", None)
        if isinstance(datamodule, ShardedDataModule):
            datamodule.prepare_sampler = self._prepare
            self._is_stratified = datamodule.partition == "stratified"
        if self._resumed_epoch is not None and not self._is_loaded and self.fraction > 0:
            rank_zero_warn(
                "Redistribution: the checkpoint was written without it. It starts from the initial split into shards."
            )

    def _prepare(self, sampler: ShardSampler, dataset: Dataset[Any]) -> None:
        """Put the samples of a resumed run into their shards, before any of them is read."""
        self._num_samples = len(dataset)  # type: ignore[arg-type]
        self._labels = None if self.within == "shard" or not self._is_stratified else labels_of(dataset)
        if self.within == "class" and self._labels is None and self.fraction > 0:
            raise ValueError(
                "Argument `within` expected 'shard' for a training set that is not split by labels, but got 'class'."
                " Leave it out, or give the data set `targets`."
            )
        if self.fraction > 0 and not most_that_move(sampler.shards, self.fraction, self._labels):
            # Sizes never change, nor the classes of a shard where they matter: so it remains.
            remedies = ["a larger fraction"] if most_that_move(sampler.shards, 0.5, self._labels) else []
            if self._labels is not None:
                remedies.append("within='shard' (--redistribution.within shard)")
            rank_zero_warn(
                f"Redistribution moves nothing: {self._why_too_few()}. Set {' or '.join(remedies) or 'fewer shards'}."
            )
        if self._assignment is not None:
            sampler.reassign(from_assignment(self._assignment, len(sampler.shards)))
        is_behind = self._resumed_epoch is not None and self._resumed_epoch > self._epochs_ended
        if self.fraction > 0 and self._is_loaded and is_behind and self._resumed_epoch is not None:
            # A checkpoint of the last step of an epoch: Lightning does not call the hooks of its end again.
            self._end_epoch(sampler, self._resumed_epoch - 1)

    # --- the exchange ------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forget what each shard has trained on, once the shards have been averaged."""
        if self._trained is not None and self._averaging is not None:
            engine = self._averaging.engine
            if engine is not None and engine.agreed:
                self._trained = None
                self._exclude()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exchange samples, if it is time."""
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        is_whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self.fraction == 0 or not isinstance(sampler, ShardSampler) or not is_whole:
            return
        if trainer.current_epoch < self._epochs_ended:  # a resumed run ends an epoch again that ended before
            return
        for control in self._controls:
            control.share_samples()
        figures = self._end_epoch(sampler, trainer.current_epoch)
        for control in self._controls:
            control.reshard()
        self._exclude()
        for name, value in figures.items():
            pl_module.log(name, value)

    def _end_epoch(self, sampler: ShardSampler, epoch: int) -> dict[str, float]:
        """Take in the end of an epoch; return what is to be logged of an exchange, nothing without one."""
        self._epochs_ended = epoch + 1
        assert self._averaging is not None  # noqa: S101
        rounds: dict[str, Any] = {"round_epochs": self._averaging.every_n_epochs}
        if self._averaging.every_n_train_steps is not None:
            rounds = {"round_steps": self._averaging.every_n_train_steps, "epoch_steps": sampler.steps}
        if not is_exchange_epoch(epoch, at=self.at, **rounds):
            return {}
        seen, skips = (sum(tables) for tables in zip(*(c.counts_since_exchange() for c in self._controls), strict=True))
        assert isinstance(seen, Tensor)  # noqa: S101
        assert isinstance(skips, Tensor)  # noqa: S101
        before = sampler.shards
        seed = derive_seed(sampler.seed, epoch, _SEED) if self.choose == "random" else None
        exchange = redistribute(
            before, skips, self.fraction, min_skips=self.min_skips, labels=self._labels, random_seed=seed
        )
        moved = torch.cat(exchange.moved)
        figures = self._figures(moved, seen, skips)
        for control in self._controls:
            control.end_exchange()
        self._say(exchange.moved, before)
        if not len(moved):
            return figures | ({} if self._moves is None else {"redistribution/moved_share": _share(self._moves)})
        if not _ends_round(epoch, **rounds):
            self._trained = _remember(self._trained, before, self._num_samples)
        sampler.reassign(exchange.shards)
        self._assignment = to_assignment(exchange.shards, self._num_samples)
        moves = torch.zeros(self._num_samples, dtype=torch.int16) if self._moves is None else self._moves
        moves[moved] += 1
        self._moves, self._last_moved = moves, moved
        return figures | {"redistribution/moved_share": _share(moves)}

    def _figures(self, moved: Tensor, seen: Tensor, skips: Tensor) -> dict[str, float]:
        """What is logged of an exchange."""
        figures = {"agc/moved": float(len(moved))}
        for name, samples in (("before", moved), ("after", self._last_moved)):
            draws = 0 if samples is None else int(seen[samples].sum())
            if samples is not None and draws:
                figures[f"redistribution/skip_rate_{name}"] = float(skips[samples].sum() / draws)
        return figures

    def _why_too_few(self) -> str:
        """What to say where no sample can ever move."""
        if self._labels is None:
            return f"a fraction of {self.fraction:g} of the smallest shard is less than one sample"
        return f"of each class, a fraction of {self.fraction:g} is less than one sample in at least one shard"

    def _say(self, moved: list[Tensor], shards: list[Tensor]) -> None:
        """Log how many samples moved, and where."""
        number, total = sum(map(len, moved)), sum(map(len, shards))
        if not number and not most_that_move(shards, self.fraction, self._labels):
            why = f": {self._why_too_few()}"
        elif not number:
            times = "" if self.min_skips <= 1 else f" {self.min_skips} times or more"
            found = "not every shard has samples"
            if self._labels is not None:
                found = "no class with enough samples in every shard has in every shard some"
            why = f": {found} that were skipped{times}, and all exchange equally many"
        else:
            ring = (f"{c} → {(c + 1) % len(moved)}" for c in range(len(moved)))
            sizes = Counter(map(len, moved))
            why = f", {' and '.join(map(str, sizes))} each along the ring of shards {', '.join(ring)}"
        rank_zero_info(f"Redistribution: {number} of {total} samples move{why}.")

    def _exclude(self) -> None:
        """Tell anti-gradient control which samples of other shards are no unseen images."""
        for control in self._controls:
            if isinstance(control.unseen_images, OtherShards):
                control.unseen_images.trained = self._trained

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exclude what a resumed run has trained on from the unseen images."""
        self._exclude()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the data."""
        datamodule = getattr(trainer, "datamodule", None)
        if isinstance(datamodule, ShardedDataModule):
            datamodule.prepare_sampler = None
        for control in self._controls:
            control.needs_samples = False

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The shard of each sample, how often it has moved, and the settings; the same on every process."""
        if self.fraction == 0 and self._assignment is None:
            return {}
        tables = {"assignment": self._assignment, "moves": self._moves, "last_moved": self._last_moved}
        return {
            **{name: None if table is None else table.clone() for name, table in tables.items()},
            "trained": None if self._trained is None else self._trained.clone(),
            "epochs_ended": self._epochs_ended,
            "settings": self._settings(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if not state_dict:
            return
        self._is_loaded = True
        self._assignment, self._moves = state_dict["assignment"], state_dict["moves"]
        self._last_moved, self._trained = state_dict["last_moved"], state_dict["trained"]
        self._epochs_ended = state_dict["epochs_ended"]
        warn_of_changes("Redistribution", state_dict["settings"], self._settings())

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("fraction", "at", "min_skips", "within", "choose")}


def _share(moves: Tensor) -> float:
    """Share of the samples that have moved."""
    return float((moves > 0).float().mean())


def _ends_round(epoch: int, **rounds: Any) -> bool:
    """Whether the shards were averaged in the last step of an epoch."""
    if "round_steps" in rounds:
        return (epoch + 1) * rounds["epoch_steps"] % rounds["round_steps"] == 0
    return (epoch + 1) % rounds["round_epochs"] == 0


def _remember(trained: Tensor | None, shards: list[Tensor], num_samples: int) -> Tensor:
    """Add the samples that each shard holds now to those that it has trained on, (K, n)."""
    if trained is None:
        trained = torch.zeros(len(shards), num_samples, dtype=torch.bool)
    for shard, samples in enumerate(shards):
        trained[shard, samples] = True
    return trained
