"""What all seams have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Observer", "Refusal", "Seam", "Selection"]


class Selection(NamedTuple):
    """Which samples of a batch stay in the loss."""

    keep: Tensor
    """Boolean, shape (B,)."""
    divisor: Tensor | int | None = None
    """What the sum of their losses is divided by; None = their number. See
    :func:`~lightning_iet.functional.anti_gradient.masked_mean`."""


Observer: TypeAlias = Callable[[Tensor, Tensor], Selection | None]
"""Gets the losses (B,) and timesteps (B,) of a training batch; returns the samples to keep, or None: hands off."""


class Refusal(ValueError):
    """No way leads to the losses of a module: the text says why, and what to do."""


class Seam:
    """An open seam. Who opens it tells it where in a training step the run is; most seams need not know.

    Attributes:
        description: Where the losses and timesteps come from, for the log; empty until that is known.
        caution: What the user should hear besides; empty if nothing.
    """

    description: str = ""
    caution: str = ""

    def begin_step(self) -> None:
        """A training step begins."""

    def before_backward(self, loss: Tensor | None = None) -> None:
        """A backward pass is about to begin; raises if the seam has seen no losses, and AGC would do nothing."""

    def end_step(self) -> None:
        """The training step is over."""

    def read(self, step: Callable[[], Any]) -> None:
        """Run a training step on images that must teach nothing, for its losses alone: the observer gets them.

        To be called after a backward pass, when the seam knows where losses are. No backward pass follows.

        Args:
            step: Calls the module's ``training_step``.
        """
        with torch.no_grad():
            step()
