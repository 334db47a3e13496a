"""Skip statistics: how many samples were left out, at which timesteps, and the gap to unseen images."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_iet.plots import loss_gap, save_figure
from lightning_iet.utilities.files import run_folder


class TimestepStatistics(nn.Module):
    """Sums by timestep that stay on the device; a module, for it needs ``to`` and ``state_dict``.

    A sample whose loss is NaN or infinite is not counted *(our choice: one of them would spoil every sum for good)*.

    Args:
        num_timesteps: Number of timesteps, T.

    Attributes:
        seen: Samples by timestep, shape (T,), int64.
        skipped: Those of them that were left out of the loss, shape (T,), int64.
        loss_sum: Sum of their losses, left out or not, shape (T,), float32.
        unseen: Unseen images by timestep, shape (T,), int64.
        unseen_loss_sum: Sum of their losses, shape (T,), float32.
        out_of_range: Samples whose timestep is not in [0, T), scalar, int64.

    Example:
        >>> statistics = TimestepStatistics(4)
        >>> statistics.update(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), keep=torch.tensor([True, False]))
        >>> statistics.skip_rate()
        tensor(0.5000)
        >>> statistics.mean_by_timestep("loss_sum", num_bins=2)
        tensor([2., nan])
    """

    seen: Tensor
    skipped: Tensor
    loss_sum: Tensor
    unseen: Tensor
    unseen_loss_sum: Tensor
    out_of_range: Tensor

    def __init__(self, num_timesteps: int) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(num_timesteps, dtype=torch.long))
        self.register_buffer("skipped", torch.zeros(num_timesteps, dtype=torch.long))
        self.register_buffer("loss_sum", torch.zeros(num_timesteps))
        self.register_buffer("unseen", torch.zeros(num_timesteps, dtype=torch.long))
        self.register_buffer("unseen_loss_sum", torch.zeros(num_timesteps))
        self.register_buffer("out_of_range", torch.zeros((), dtype=torch.long))

    def update(self, losses: Tensor, timesteps: Tensor, *, keep: Tensor) -> None:
        """Count a batch: losses without graph, timesteps in [0, T), and which samples stay in the loss; all (B,)."""
        finite = losses.isfinite()
        self.seen.index_add_(0, timesteps, finite.long())
        self.skipped.index_add_(0, timesteps, (finite & ~keep).long())
        self.loss_sum.index_add_(0, timesteps, torch.where(finite, losses, 0).float())

    def update_unseen(self, losses: Tensor, timesteps: Tensor) -> None:
        """Count a batch of unseen images: losses without graph, and timesteps in [0, T); both (B,)."""
        finite = losses.isfinite()
        self.unseen.index_add_(0, timesteps, finite.long())
        self.unseen_loss_sum.index_add_(0, timesteps, torch.where(finite, losses, 0).float())

    def add(self, other: "TimestepStatistics") -> None:
        """Add the sums of another, in place."""
        for total, buffer in zip(self.buffers(), other.buffers(), strict=True):
            total += buffer

    def copy_to(self, device: torch.device) -> "TimestepStatistics":
        """Make a copy on a device; it shares no memory with this one."""
        copied = TimestepStatistics(len(self.seen)).to(device)
        copied.load_state_dict(self.state_dict())
        return copied

    def reset(self) -> None:
        """Set every sum to zero, in place."""
        for buffer in self.buffers():
            buffer.zero_()

    def skip_rate(self) -> Tensor:
        """Share of samples left out, scalar in [0, 1]; 0 if none was seen."""
        return self.skipped.sum() / self.seen.sum().clamp(min=1)

    def mean_by_timestep(self, name: str, num_bins: int) -> Tensor:
        """Divide a sum by its number of samples, in equal bins of the timestep.

        Args:
            name: ``"skipped"``, ``"loss_sum"`` or ``"unseen_loss_sum"``.
            num_bins: Number of bins, at least 1; no more than T are made.

        Returns:
            Float tensor of shape (num_bins,) on the CPU, smallest timesteps first; NaN where no sample was seen.

        Raises:
            ValueError: If ``num_bins`` is less than 1.
        """
        if num_bins < 1:
            raise ValueError(f"Argument `num_bins` expected at least 1, but got {num_bins}.")
        counted = "unseen" if name == "unseen_loss_sum" else "seen"
        total, number = self.by_timestep((name, counted), num_bins)
        return (total / number).float()

    def by_timestep(self, names: Sequence[str], num_bins: int) -> Tensor:
        """Sums in equal bins of the timestep.

        Args:
            names: Of the sums.
            num_bins: Number of bins; no more than T are made.

        Returns:
            Float64 tensor of shape (len(names), num_bins) on the CPU, smallest timesteps first.
        """
        num_timesteps = len(self.seen)
        num_bins = min(num_bins, num_timesteps)
        bins = torch.arange(num_timesteps) * num_bins // num_timesteps
        sums = torch.stack([self.get_buffer(name).cpu().double() for name in names])
        return torch.zeros(len(names), num_bins, dtype=torch.float64).index_add(1, bins, sums)


_SUMS = ("seen", "loss_sum", "skipped", "unseen", "unseen_loss_sum")
_BANDS = 10
_MOST = 128


class GapHistory:
    r"""Sums of each epoch in ten equal bands of the timestep; of long runs, of several epochs together.

    The *gap* in a band is :math:`1 - \bar{l}_\text{train} / \bar{l}_\text{unseen}`: 0 where the model denoises its
    training images no better than images that it does not train on, 1 where it knows them by heart.

    Attributes:
        rows: Sums, shape (n, 5, bands), float64, on the CPU; at most 128 rows.
        width: Number of epochs in a row; the last row may not be full yet.

    Example:
        >>> statistics = TimestepStatistics(4)
        >>> statistics.update(torch.ones(4), torch.arange(4), keep=torch.ones(4).bool())
        >>> statistics.update_unseen(torch.full((4,), 2.0), torch.arange(4))
        >>> history = GapHistory()
        >>> history.add(statistics)
        >>> history.gap()
        tensor([0.5000, 0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.rows = torch.zeros(0, len(_SUMS), 0, dtype=torch.float64)
        self.width = 1
        self._filled = 0  # epochs in the last row; 0 = the next epoch begins one

    def add(self, epoch: TimestepStatistics) -> None:
        """Take in the sums of an epoch of all processes."""
        sums = epoch.by_timestep(_SUMS, _BANDS)
        if not self._filled:
            self.rows = torch.cat([self.rows.reshape(-1, *sums.shape), torch.zeros_like(sums)[None]])
        self.rows[-1] += sums
        self._filled = (self._filled + 1) % self.width
        if len(self.rows) == _MOST and not self._filled:
            self.rows = self.rows.unflatten(0, (-1, 2)).sum(1)
            self.width *= 2

    def means(self) -> dict[str, Tensor]:
        """Training loss, unseen loss and skip rate in each row and band, (n, bands); NaN where nothing was seen."""
        seen, losses, skipped, unseen, unseen_losses = self.rows.unbind(1)
        return {"training_loss": losses / seen, "unseen_loss": unseen_losses / unseen, "skip_rate": skipped / seen}

    def gap(self, rows: int = 1) -> Tensor:
        """The gap in each band over the last rows, (bands,); NaN where nothing was seen."""
        seen, losses, _, unseen, unseen_losses = self.rows[-rows:].sum(0)
        return 1 - (losses / seen) / (unseen_losses / unseen)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        return {"rows": self.rows.clone(), "width": self.width, "filled": self._filled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.rows, self.width = state_dict["rows"].cpu().clone(), state_dict["width"]
        self._filled = state_dict["filled"]


class SkipStatistics:
    """Sums by bin of the timestep: the current epoch of this process, and the finished ones of all.

    Args:
        num_bins: Number of bins.

    Attributes:
        epoch: The current epoch of this process, over all shards that it hosts.
        run: The finished epochs of all processes.
        gaps: Training and unseen losses of the finished epochs, one by one.
        last: The same of the last one alone.
    """

    def __init__(self, num_bins: int) -> None:
        self.epoch = TimestepStatistics(num_bins)
        self.run = TimestepStatistics(num_bins)
        self.gaps, self.last = GapHistory(), GapHistory()

    def to(self, device: torch.device) -> "SkipStatistics":
        """Move to a device, into tensors of its own."""
        self.epoch, self.run = self.epoch.copy_to(device), self.run.copy_to(device)
        return self

    def end_epoch(self, strategy: Strategy) -> tuple[Tensor, int]:
        """Add the epoch of all processes to the run; return its skip rate, and how many timesteps were out of range."""
        for buffer in self.epoch.buffers():
            buffer.copy_(strategy.reduce(buffer, reduce_op="sum"))
        skip_rate, num_outside = self.epoch.skip_rate(), int(self.epoch.out_of_range)
        self.run.add(self.epoch)
        self.last = GapHistory()
        for history in (self.gaps, self.last):
            history.add(self.epoch)
        self.epoch.reset()
        return skip_rate, num_outside

    def total(self) -> TimestepStatistics:
        """The finished epochs of all processes and the current one of this process."""
        total = self.run.copy_to(self.epoch.seen.device)
        total.add(self.epoch)
        return total

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name."""
        states = {"epoch_statistics": self.epoch.state_dict(), "run_statistics": self.run.state_dict()}
        return states | {"gaps": self.gaps.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        # Not strict: checkpoints from before unseen images were counted have none.
        self.epoch.load_state_dict(state_dict["epoch_statistics"], strict=False)
        self.run.load_state_dict(state_dict["run_statistics"], strict=False)
        if "gaps" in state_dict:
            self.gaps.load_state_dict(state_dict["gaps"])


class SkipReaders:
    """What :class:`~lightning_iet.callbacks.AntiGradientControl` tells about its run."""

    _statistics: SkipStatistics

    @property
    def epoch_statistics(self) -> TimestepStatistics:
        """The current epoch of this process, over all shards that it hosts."""
        return self._statistics.epoch

    @property
    def run_statistics(self) -> TimestepStatistics:
        """The finished epochs of all processes."""
        return self._statistics.run

    def skip_rate(self) -> float:
        """Share of all samples so far that were left out of the loss, in [0, 1]; 0 before the first sample.

        Reads the finished epochs of all processes and the current epoch of this one, without talking to the others.
        """
        return float(self._statistics.total().skip_rate())

    def skip_rate_by_timestep(self, num_bins: int = 50) -> Tensor:
        """Share of samples left out, as :meth:`skip_rate`, in equal bins of the timestep.

        Args:
            num_bins: At least 1; no more are made than the bank has entries.

        Returns:
            Float tensor of shape (num_bins,) on the CPU, smallest timesteps first; NaN where no sample was seen.
        """
        return self._statistics.total().mean_by_timestep("skipped", num_bins)

    def loss_by_timestep(self, num_bins: int = 50) -> Tensor:
        """Mean loss of all samples so far, left out or not, in equal bins of the timestep.

        Arguments and result as of :meth:`skip_rate_by_timestep`.
        """
        return self._statistics.total().mean_by_timestep("loss_sum", num_bins)

    def unseen_loss_by_timestep(self, num_bins: int = 50) -> Tensor:
        """Mean loss of all unseen images so far, in equal bins of the timestep; NaN without a reference to unseen ones.

        Arguments and result as of :meth:`skip_rate_by_timestep`.
        """
        return self._statistics.total().mean_by_timestep("unseen_loss_sum", num_bins)

    @property
    def gap_history(self) -> GapHistory:
        """Training and unseen losses of the finished epochs of all processes."""
        return self._statistics.gaps

    def gap(self) -> float:
        """How far training losses lie under those of unseen images, as a share of these; the mean over timesteps.

        Over the last tenth of the finished epochs. 0: the model denoises its training images no better than unseen
        ones; 1: it knows them by heart. NaN before the first epoch has ended, and without a reference to unseen images.
        """
        gaps = self._statistics.gaps
        return float(gaps.gap(max(1, len(gaps.rows) // 10)).nanmean()) if len(gaps.rows) else float("nan")


def gap_metrics(epoch: GapHistory) -> tuple[Tensor | None, dict[str, float]]:
    """Figures of one epoch to log.

    Args:
        epoch: Holds that epoch only.

    Returns:
        The mean gap over all timesteps where both losses are known (None where nowhere), and training loss, unseen loss
        and skip rate by tenths of the timesteps, without those where nothing was seen.
    """
    gaps = epoch.gap()
    known = gaps[gaps.isfinite()]
    by_bin = {
        f"{name}/bin_{number}": value
        for name, (means,) in epoch.means().items()
        for number, value in enumerate(means.tolist())
        if value == value  # not NaN
    }
    return (known.mean().float() if len(known) else None), by_bin


def log_gap(trainer: pl.Trainer, module: pl.LightningModule, epoch: GapHistory, *, prefix: str) -> None:
    """Log the figures of an epoch; the gap also for the progress bar, and for callbacks that wait for it.

    Args:
        trainer: At the end of the epoch.
        module: Logs.
        epoch: Holds that epoch only; the same on all processes.
        prefix: Of the names.
    """
    gap, by_bin = gap_metrics(epoch)
    if gap is not None:
        module.log(f"{prefix}gap", gap, prog_bar=True)
    values = {f"{prefix}{name}": value for name, value in by_bin.items()}
    for logger in trainer.loggers:
        logger.log_metrics(values | {"epoch": trainer.current_epoch}, step=trainer.global_step)


def publish_gap(trainer: pl.Trainer, history: GapHistory, *, prefix: str, num_timesteps: int) -> None:
    """Draw the gap over time into the run folder, and for loggers that take pictures; nothing without a logger.

    Args:
        trainer: Its run folder, and its loggers.
        history: Of the run.
        prefix: Of the names of figures: ``agc/`` makes ``gap.png``, ``agc/model.unet/`` ``gap-model.unet.png``.
        num_timesteps: Of the noise schedule.
    """
    if not trainer.loggers or trainer.fast_dev_run or not len(history.rows):  # type: ignore[attr-defined]
        return
    figure = loss_gap(**history.means(), epochs_per_row=history.width, num_timesteps=num_timesteps)
    _, *which, _ = prefix.split("/")
    path = run_folder(trainer) / f"{'-'.join(['gap', *which])}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    rank_zero_info(f"AntiGradientControl: training and unseen losses over time are drawn in {path}")
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image(f"{prefix}gap", [str(path)])
