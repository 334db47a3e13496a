"""Logs each shard's loss, skip rate, and distance from the average."""

import logging
import math
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

log = logging.getLogger(__name__)

# Distances a few times the first are usual while a learning rate warms up; ten times *(our choice)* are not.
TOO_FAR = 10.0


def diverges(distances: list[float], reference: float) -> bool:
    """Whether shard models are so far from one another that their average means little.

    Args:
        distances: Of each shard from the average.
        reference: Mean distance at the first averaging of the run.

    Example:
        >>> diverges([0.1, 0.2], reference=0.1), diverges([0.1, 1.1], reference=0.1), diverges([math.nan], 0.1)
        (False, True, True)
    """
    return any(not math.isfinite(distance) or distance > TOO_FAR * reference for distance in distances)


class ShardLog:
    """Sums values by shard, on the device, and logs their means over all processes at the end of each epoch.

    ``shard_0/loss`` is the mean training loss of the shard, ``shard_0/skip_rate`` the share of samples that AGC left
    out, ``shard_0/distance`` the shard's distance from the average just before the averagings of the epoch.

    Args:
        num_shards: Number of shards, K.
        device: Device of the losses.
    """

    names = ("loss", "skip_rate", "distance")

    def __init__(self, num_shards: int, device: torch.device) -> None:
        # Sums, and numbers of values, by name and shard.
        self.sums = torch.zeros(2, len(self.names), num_shards, dtype=torch.float32, device=device)
        self.reference: float | None = None
        self._has_warned = False

    def add(self, name: str, shard: int, value: Tensor) -> None:
        """Add a value of a shard; the host does not wait for the device."""
        row = self.names.index(name)
        self.sums[0, row, shard] += value.detach().to(self.sums.device).float().mean()
        self.sums[1, row, shard] += 1

    def add_step(self, trainer: Trainer, shard: int, outputs: Any) -> None:
        """Add the loss of a training step, and the skip rate where a callback has one."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            # Lightning divides the loss by the number of batches whose gradients it accumulates.
            self.add("loss", shard, loss * trainer.accumulate_grad_batches)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            rate = getattr(callback, "last_skip_rate", None)
            if isinstance(rate, Tensor):
                self.add("skip_rate", shard, rate)

    def flush(self, trainer: Trainer) -> None:
        """Log the means of the epoch, and warn when shards diverge. A collective."""
        total = trainer.strategy.reduce(self.sums.clone(), reduce_op="sum")
        assert isinstance(total, Tensor)  # noqa: S101
        self.sums.zero_()
        values: dict[str, list[float]] = dict(zip(self.names, (total[0] / total[1]).tolist(), strict=True))
        seen = total[1].bool().tolist()
        metrics: dict[str, float] = {
            f"shard_{shard}/{name}": value
            for name, known in zip(self.names, seen, strict=True)
            for shard, value in enumerate(values[name])
            if known[shard]
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics | {"epoch": trainer.current_epoch}, step=trainer.global_step)
        if "shard_0/distance" not in metrics:
            return
        distances = values["distance"]
        if not self.reference:  # none yet, or 0: a learning rate that starts there
            self.reference = sum(distances) / len(distances)
        elif diverges(distances, self.reference) and not self._has_warned:
            self._has_warned = True
            log.warning(
                "Shard models diverge: at the averaging of epoch %d they were up to %.3g of its norm away from the "
                "average, at the first one %.3g. Average more often, or use a smaller learning rate.",
                trainer.current_epoch + 1, max(distances), self.reference,
            )  # fmt: skip

    def state_dict(self, trainer: Trainer) -> dict[str, Any]:
        """Return the epoch so far, over all processes. A collective."""
        total = trainer.strategy.reduce(self.sums.clone(), reduce_op="sum")
        return {"sums": total.cpu(), "reference": self.reference}

    def load_state_dict(self, state: dict[str, Any], trainer: Trainer) -> None:
        """Continue an epoch; its sums count once, on the first process."""
        self.reference = state["reference"]
        if trainer.is_global_zero:
            self.sums.copy_(state["sums"])
