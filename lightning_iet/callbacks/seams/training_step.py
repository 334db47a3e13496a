"""The seam of modules whose ``training_step`` returns ``sample_loss`` and ``timesteps`` beside its ``loss``."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_iet.callbacks.seams.base import Observer, Seam
from lightning_iet.functional.anti_gradient import masked_mean
from lightning_iet.utilities.shadow import shadowed

__all__ = ["follows_protocol", "training_step_seam"]

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

    with shadowed(module, "training_step", masked_training_step):
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
