"""What happened at each timestep: how many samples were seen, how many left out, and the sum of their losses."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["TimestepStatistics"]


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
