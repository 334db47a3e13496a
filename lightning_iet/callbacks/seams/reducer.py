"""The seam of modules that reduce their losses by an attribute ``loss_reducer``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
from torch import Tensor

from lightning_iet.callbacks.seams.base import Observer, Seam
from lightning_iet.functional.anti_gradient import masked_mean
from lightning_iet.utilities.shadow import shadowed

__all__ = ["reducer_seam"]


class _ReducerSeam(Seam):
    is_reading = False

    def __init__(self, module: pl.LightningModule, observe: Observer) -> None:
        self.module = module
        self.observe = observe
        self.reduce = cast(Callable[[Tensor, Tensor], Tensor], module.loss_reducer)

    def __call__(self, sample_loss: Tensor, timesteps: Tensor) -> Tensor:
        if not sample_loss.requires_grad and not self.is_reading:
            return self.reduce(sample_loss, timesteps)
        selection = self.observe(sample_loss, timesteps)
        self.description = "losses and timesteps from the attribute `loss_reducer`"
        if selection is None:
            return self.reduce(sample_loss, timesteps)
        return masked_mean(sample_loss, selection.keep, divisor=selection.divisor)

    def read(self, step: Callable[[], Any]) -> None:
        with shadowed(self, "is_reading", True):
            super().read(step)

    def before_backward(self, loss: Tensor | None = None) -> None:
        if not self.description:
            raise ValueError(
                f"AntiGradientControl expected {type(self.module).__name__}.training_step to call `loss_reducer` on"
                " losses that require a gradient, but got no such call. Call it, or rename that attribute."
            )


@contextmanager
def reducer_seam(module: pl.LightningModule, observe: Observer) -> Iterator[Seam]:
    """Put a masked mean in the place of ``module.loss_reducer``, a callable (sample_loss, timesteps) -> scalar.

    Losses without a graph pass by: they belong to validation, where nothing is learnt.

    Args:
        module: A LightningModule whose ``training_step`` calls its attribute ``loss_reducer``.
        observe: Called once per training batch, see :data:`Observer`.
    """
    seam = _ReducerSeam(module, observe)
    with shadowed(module, "loss_reducer", seam.__call__):
        yield seam
