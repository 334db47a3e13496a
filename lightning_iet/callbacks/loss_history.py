"""The mean training loss of each epoch, remembered without a wait for the device."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

__all__ = ["LossHistory"]


class LossHistory:
    """Mean loss of all samples of an epoch, also of those that anti-gradient control leaves out.

    Sums stay on the device until somebody asks for them.

    Example:
        >>> from lightning.pytorch.strategies import SingleDeviceStrategy
        >>> history = LossHistory()
        >>> history.add({"loss": torch.tensor(9.0), "sample_loss": torch.tensor([1.0, 2.0])})
        >>> history.add({"loss": torch.tensor(3.0)})
        >>> history.end_epoch(SingleDeviceStrategy())
        >>> history.values()
        [2.0]
    """

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0
        self._epochs: list[Tensor | float] = []

    def add(self, outputs: Any) -> None:
        """Takes in what a training step returned: ``sample_loss`` (B,) where there is one, else ``loss``."""
        if not isinstance(outputs, Mapping):
            return
        losses = outputs.get("sample_loss", outputs.get("loss"))
        if isinstance(losses, Tensor):
            losses = losses.detach().float()
            self._sum = self._sum + losses.sum()
            self._count += losses.numel()

    def end_epoch(self, strategy: Strategy) -> None:
        """Closes an epoch, over all processes."""
        if not isinstance(self._sum, Tensor):
            return
        total = torch.stack([self._sum, torch.full_like(self._sum, self._count)])
        total = strategy.reduce(total, reduce_op="sum")
        self._epochs.append(total[0] / total[1])
        self._sum, self._count = 0.0, 0

    def values(self) -> list[float]:
        """Mean loss of each finished epoch."""
        self._epochs = [float(loss) for loss in self._epochs]
        return list(self._epochs)

    def load(self, values: list[float]) -> None:
        """Puts back what :meth:`values` returned, for a run that goes on."""
        self._epochs = list(values)
