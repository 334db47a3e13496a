"""What anti-gradient control tells about a run: how much it left out, and where."""

from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_iet.callbacks.gap_history import GapHistory
from lightning_iet.callbacks.timestep_statistics import TimestepStatistics

__all__ = ["SkipReaders", "SkipStatistics"]


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
