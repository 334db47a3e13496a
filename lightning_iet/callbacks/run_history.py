"""What a run remembers of its training: the mean loss of each epoch, and the time that it took."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

__all__ = ["RunHistory"]


class RunHistory:
    """Mean loss of all samples of each epoch (also of those that anti-gradient control leaves out), and a stop watch.

    Sums stay on the device until somebody asks for them.

    Example:
        >>> from lightning.pytorch.strategies import SingleDeviceStrategy
        >>> history = RunHistory()
        >>> history.add({"loss": torch.tensor(9.0), "sample_loss": torch.tensor([1.0, 2.0])})
        >>> history.add({"loss": torch.tensor(3.0)})
        >>> history.end_epoch(SingleDeviceStrategy())
        >>> history.losses()
        [2.0]
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0
        self._epochs: list[Tensor | float] = []
        self._seconds = 0.0
        self._since: float | None = None

    def add(self, outputs: Any) -> None:
        """Takes in what a training step returned: ``sample_loss`` (B,) where there is one, else ``loss``."""
        losses = outputs.get("sample_loss", outputs.get("loss")) if isinstance(outputs, Mapping) else None
        if isinstance(losses, Tensor):
            total = losses.detach().float().sum()
            self._sum = total if self._sum is None else self._sum + total
            self._count += losses.numel()

    def end_epoch(self, strategy: Strategy) -> None:
        """Closes an epoch, over all processes."""
        if self._sum is None:
            return
        total = torch.stack([self._sum, torch.full_like(self._sum, self._count)])
        total = strategy.reduce(total, reduce_op="sum")
        self._epochs.append(total[0] / total[1])
        self._sum, self._count = None, 0

    def losses(self) -> list[float]:
        """Mean loss of each finished epoch."""
        losses = [float(loss) for loss in self._epochs]
        self._epochs = [*losses]  # not to be fetched from the device again
        return losses

    def start(self) -> None:
        """Lets the time run."""
        self._since = time.monotonic()

    def pause(self) -> None:
        """Stops the time, for what is not training."""
        self._seconds, self._since = self.seconds(), None

    def seconds(self) -> float:
        """Seconds between starts and pauses so far."""
        return self._seconds + (0 if self._since is None else time.monotonic() - self._since)

    def state_dict(self) -> dict[str, Any]:
        """Losses and seconds, plain numbers."""
        return {"losses": self.losses(), "seconds": self.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was."""
        self._epochs = list(state_dict["losses"])
        self._seconds = state_dict["seconds"]
