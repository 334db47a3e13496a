"""The choice of a seam."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_iet.callbacks.anti_gradient_control.losses.denoiser import DenoiserSeam
from lightning_iet.callbacks.anti_gradient_control.losses.protocols import (
    Observer,
    Seam,
    follows_protocol,
    reducer_seam,
    training_step_seam,
)


@contextmanager
def open_seam(
    module: pl.LightningModule,
    observe: Observer,
    *,
    denoiser: str | None = None,
    timestep: str | None = None,
    several_optimizers: bool = False,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Seam]:
    """Choose the seam of a module, and open it.

    Its ``loss_reducer`` if it has one, else the dict that ``training_step`` returns if it is one, else hooks.

    Args:
        module: Any LightningModule.
        observe: Called once per training batch, see
            :data:`~lightning_iet.callbacks.anti_gradient_control.losses.Observer`.
        denoiser: Name of the denoiser; if it or ``timestep`` is given, the hooks are taken.
        timestep: Name of the denoiser's argument.
        several_optimizers: See :class:`~lightning_iet.callbacks.anti_gradient_control.losses.DenoiserSeam`.
        scale: Likewise.

    Yields:
        The seam, to be told where in a training step the run is.

    Example:
        >>> import torch
        >>> from lightning_iet.callbacks.anti_gradient_control.losses import Selection
        >>> class Denoiser(pl.LightningModule):
        ...     def training_step(self, batch, batch_idx):
        ...         return {"loss": batch.mean(), "sample_loss": batch, "timesteps": torch.tensor([3, 5])}
        >>> module = Denoiser()
        >>> with open_seam(module, lambda losses, timesteps: Selection(losses > 1.0)):
        ...     module.training_step(torch.tensor([1.0, 3.0]), 0)["loss"]
        tensor(3.)
        >>> module.training_step(torch.tensor([1.0, 3.0]), 0)["loss"]
        tensor(2.)
    """
    by_hand = denoiser is not None or timestep is not None
    if not by_hand and callable(getattr(module, "loss_reducer", None)):
        with reducer_seam(module, observe) as seam:
            yield seam
        return
    hooks = DenoiserSeam(
        module,
        observe,
        denoiser=denoiser,
        timestep=timestep,
        several_optimizers=several_optimizers,
        scale=scale,
    )
    if by_hand or not module.automatic_optimization:
        with hooks.opened():
            yield hooks
        return
    with _Either(module, observe, hooks).opened() as seam:
        yield seam


class _Either(Seam):
    """Listens with hooks until the first step returns; if it gives its losses away, they are taken instead."""

    def __init__(self, module: pl.LightningModule, observe: Observer, hooks: DenoiserSeam) -> None:
        self.module = module
        self.observe = observe
        self.chosen: Seam = hooks
        self._hooks = hooks
        self._settled = False

    @contextmanager
    def opened(self) -> Iterator[Seam]:
        with self._hooks.opened(), training_step_seam(self.module, self.observe, settle=self._settle) as self._dict:
            yield self

    def _settle(self, outputs: Any) -> bool:
        if not self._settled and follows_protocol(outputs):
            self.chosen = self._dict
            self._hooks.close()
        self._settled = True
        return self.chosen is self._dict

    @property
    def description(self) -> str:  # type: ignore[override]
        """That of the seam that is chosen."""
        return self.chosen.description

    @property
    def caution(self) -> str:  # type: ignore[override]
        """Likewise."""
        return self.chosen.caution

    def begin_step(self) -> None:
        self.chosen.begin_step()

    def before_backward(self, loss: Tensor | None = None) -> None:
        self.chosen.before_backward(loss)

    def end_step(self) -> None:
        self.chosen.end_step()

    def read(self, step: Callable[[], Any]) -> None:
        self.chosen.read(step)
