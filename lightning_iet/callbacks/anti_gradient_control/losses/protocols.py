"""The two protocols by which a module hands over its per-sample losses."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_iet.functional.anti_gradient import masked_mean
from lightning_iet.utilities.lightning import patched_attribute


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
        with patched_attribute(self, "is_reading", True):
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
    with patched_attribute(module, "loss_reducer", seam.__call__):
        yield seam


_KEYS = ("loss", "sample_loss", "timesteps")


def follows_protocol(outputs: Any) -> bool:
    """Whether a ``training_step`` gives away its losses and timesteps."""
    return isinstance(outputs, Mapping) and all(key in outputs for key in _KEYS)


@contextmanager
def training_step_seam(
    module: pl.LightningModule, observe: Observer, *, settle: Callable[[Any], bool] | None = None
) -> Iterator[Seam]:
    """Wrap ``module.training_step`` and put a masked mean in the place of the ``loss`` that it returns.

    A ``training_step`` that returns None skips the batch, as Lightning defines it.

    Args:
        module: A LightningModule whose ``training_step`` returns a dict with ``loss``, ``sample_loss`` (B,) and
            ``timesteps`` (B,).
        observe: Called once per training batch, see :data:`Observer`.
        settle: Gets what a step returned; False leaves it untouched. By default nothing is.

    Raises:
        TypeError: At the first batch, if ``training_step`` returns something else.
        ValueError: At the first batch, if a key is missing.
    """
    training_step: Callable[..., Any] = module.training_step
    seam = Seam()

    @functools.wraps(training_step)  # Lightning reads the signature through __wrapped__
    def masked_training_step(*args: Any, **kwargs: Any) -> Any:
        outputs = training_step(*args, **kwargs)
        if outputs is None or (settle is not None and not settle(outputs)):
            return outputs
        _check_outputs(outputs)
        selection = observe(outputs["sample_loss"], outputs["timesteps"])
        seam.description = "losses and timesteps from the dict that `training_step` returns"
        if selection is None:
            return outputs
        return {**outputs, "loss": masked_mean(outputs["sample_loss"], selection.keep, divisor=selection.divisor)}

    with patched_attribute(module, "training_step", masked_training_step):
        yield seam


def _check_outputs(outputs: Any) -> None:
    remedy = 'Return {"loss": ..., "sample_loss": (B,), "timesteps": (B,)}.'
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"AntiGradientControl expected a dict from `training_step`, but got {type(outputs).__name__}. {remedy}"
        )
    missing = [key for key in _KEYS if key not in outputs]
    if missing:
        raise ValueError(
            f"AntiGradientControl expected the keys 'loss', 'sample_loss' and 'timesteps' from `training_step`,"
            f" but got {sorted(map(str, outputs))} without {missing}. {remedy}"
        )
    for key in ("sample_loss", "timesteps"):
        if not isinstance(outputs[key], Tensor):
            raise TypeError(f"Argument `{key}` expected a tensor, but got {type(outputs[key]).__name__}. {remedy}")
