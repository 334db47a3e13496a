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

    Sums stay on the device, and on their process, until somebody asks for them.

    Example:
        >>> from lightning.pytorch.strategies import SingleDeviceStrategy
        >>> history = RunHistory()
        >>> history.add({"loss": torch.tensor(9.0), "sample_loss": torch.tensor([1.0, 2.0])}, epoch=0)
        >>> history.add({"loss": torch.tensor(3.0)}, epoch=0)
        >>> history.losses(SingleDeviceStrategy())
        [2.0]
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # by epoch, (2,): sum and number of the losses of this process
        self._earlier: dict[int, list[float]] = {}  # the same of all processes, before the run was taken up again
        self._seconds = 0.0
        self._since: float | None = None

    def add(self, outputs: Any, *, epoch: int) -> None:
        """Takes in what a training step returned: ``sample_loss`` (B,) where there is one, else ``loss``."""
        losses = outputs.get("sample_loss", outputs.get("loss")) if isinstance(outputs, Mapping) else None
        if isinstance(losses, Tensor):
            losses = losses.detach().float()
            batch = torch.stack([losses.sum(), torch.ones_like(losses).sum()])
            before = self._sums.get(epoch)
            self._sums[epoch] = batch if before is None else before.to(batch.device) + batch
        elif outputs is None:
            # A step in which this process waits for others: its epoch counts, so that all have the same ones.
            self._sums.setdefault(epoch, torch.zeros(2))

    def losses(self, strategy: Strategy) -> list[float]:
        """Mean loss of each epoch over all processes, every one of which has to ask."""
        return [total / number for total, number in self._totals(strategy).values() if number]

    def _totals(self, strategy: Strategy) -> dict[int, list[float]]:
        totals = dict(self._earlier)
        if self._sums:
            local = torch.stack([total.to(strategy.root_device) for total in self._sums.values()])
            sums = strategy.reduce(local, reduce_op="sum").tolist()
            for epoch, (total, number) in zip(self._sums, sums, strict=True):
                before = totals.get(epoch, [0.0, 0.0])
                totals[epoch] = [before[0] + total, before[1] + number]
        return totals

    def start(self) -> None:
        """Lets the time run."""
        self._since = time.monotonic()

    def pause(self) -> None:
        """Stops the time, for what is not training."""
        self._seconds, self._since = self.seconds(), None

    def seconds(self) -> float:
        """Seconds between starts and pauses so far."""
        return self._seconds + (0 if self._since is None else time.monotonic() - self._since)

    def state_dict(self, strategy: Strategy) -> dict[str, Any]:
        """Plain numbers of all processes, every one of which has to ask."""
        return {"losses": self._totals(strategy), "seconds": self.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was, in the middle of an epoch too."""
        self._earlier, self._seconds = dict(state_dict["losses"]), state_dict["seconds"]
