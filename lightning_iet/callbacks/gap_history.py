"""How far training losses lay under those of unseen images, from the first epoch to the last."""

from typing import Any

import torch
from torch import Tensor

from lightning_iet.callbacks.timestep_statistics import TimestepStatistics

__all__ = ["GapHistory"]

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
