"""What all metrics of this package share."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = ["BaseMetric", "TwoKindsMetric", "joined"]


class BaseMetric(Metric):
    """Base of the metrics: what they hold follows the device of the module around them, and never its dtype.

    Half precision (``precision="bf16-true"``) is enough to train by. Distances of copies, and sums over thousands of
    images, it would ruin; so neither states nor training images nor feature networks are converted.
    """

    is_differentiable = False
    full_state_update = False

    def _apply(self, fn: Callable[..., Any], exclude_state: Iterable[str] = "") -> "BaseMetric":
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)  # type: ignore[arg-type]
        return self


class TwoKindsMetric(BaseMetric):
    """Base of the metrics that are fed two kinds of samples, one kind at a time."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Take in more samples, as ``update``; a batch of one kind has no value of its own to return."""
        self.update(*args, **kwargs)


def joined(state: Tensor | list[Tensor], *, device: torch.device) -> Tensor:
    """Return a list state as one tensor, with no values where there was no update.

    Args:
        state: a list state, which torchmetrics makes a tensor while processes are synchronised.
        device: of the metric.

    Returns:
        The values of all updates, in order.

    Example:
        >>> joined([torch.ones(2), torch.zeros(1)], device=torch.device("cpu"))
        tensor([1., 1., 0.])
        >>> joined([], device=torch.device("cpu"))
        tensor([])
    """
    return dim_zero_cat(state) if len(state) else torch.zeros(0, device=device)
