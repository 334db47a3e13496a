"""Seams: the places where a callback can reach the per-sample losses of somebody else's LightningModule.

A seam is a context manager. While it is open, the module shows each training batch to an *observer*, which sees the
losses before they are averaged and says which samples stay in. When it closes, also on an exception, the module is as
it was before. :func:`open_seam` chooses the seam; one function each:

- :func:`reducer_seam`: the module reduces its losses by an attribute ``loss_reducer(sample_loss, timesteps)``;
- :func:`training_step_seam`: ``training_step`` returns a dict with ``loss``, ``sample_loss`` and ``timesteps``.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias, cast

import lightning.pytorch as pl
from torch import Tensor

from lightning_iet.functional.anti_gradient import masked_mean
from lightning_iet.utilities.shadow import shadowed

__all__ = ["Observer", "open_seam", "reducer_seam", "training_step_seam"]

Observer: TypeAlias = Callable[[Tensor, Tensor], Tensor | None]
"""Gets the losses (B,) and timesteps (B,) of a training batch; returns the samples to keep (B,), or None: hands off."""


def open_seam(module: pl.LightningModule, observe: Observer) -> AbstractContextManager[None]:
    """Choose the seam of a module: its ``loss_reducer`` if it has one, else what its ``training_step`` returns.

    Args:
        module: Any LightningModule with automatic optimization.
        observe: Called once per training batch, see :data:`Observer`.

    Returns:
        A context manager: enter it to open the seam, leave it to close the seam.

    Example:
        >>> import torch
        >>> class Denoiser(pl.LightningModule):
        ...     def training_step(self, batch, batch_idx):
        ...         return {"loss": batch.mean(), "sample_loss": batch, "timesteps": torch.tensor([3, 5])}
        >>> module = Denoiser()
        >>> with open_seam(module, lambda losses, timesteps: losses > 1.0):
        ...     module.training_step(torch.tensor([1.0, 3.0]), 0)["loss"]
        tensor(3.)
        >>> module.training_step(torch.tensor([1.0, 3.0]), 0)["loss"]
        tensor(2.)
    """
    if callable(getattr(module, "loss_reducer", None)):
        return reducer_seam(module, observe)
    return training_step_seam(module, observe)


@contextmanager
def reducer_seam(module: pl.LightningModule, observe: Observer) -> Iterator[None]:
    """Put a masked mean in the place of ``module.loss_reducer``, a callable (sample_loss, timesteps) -> scalar.

    Losses without a graph pass by: they belong to validation, where nothing is learnt.

    Args:
        module: A LightningModule whose ``training_step`` calls its attribute ``loss_reducer``.
        observe: Called once per training batch, see :data:`Observer`.
    """
    reduce = cast(Callable[[Tensor, Tensor], Tensor], module.loss_reducer)

    def reduce_what_is_kept(sample_loss: Tensor, timesteps: Tensor) -> Tensor:
        keep = observe(sample_loss, timesteps) if sample_loss.requires_grad else None
        return reduce(sample_loss, timesteps) if keep is None else masked_mean(sample_loss, keep)

    with shadowed(module, "loss_reducer", reduce_what_is_kept):
        yield


@contextmanager
def training_step_seam(module: pl.LightningModule, observe: Observer) -> Iterator[None]:
    """Wrap ``module.training_step`` and put a masked mean in the place of the ``loss`` that it returns.

    A ``training_step`` that returns None skips the batch, as Lightning defines it.

    Args:
        module: A LightningModule whose ``training_step`` returns a dict with ``loss``, ``sample_loss`` (B,) and
            ``timesteps`` (B,).
        observe: Called once per training batch, see :data:`Observer`.

    Raises:
        TypeError: At the first batch, if ``training_step`` returns something else.
        ValueError: At the first batch, if a key is missing.
    """
    training_step: Callable[..., Any] = module.training_step

    @functools.wraps(training_step)  # Lightning reads the signature through __wrapped__
    def masked_training_step(*args: Any, **kwargs: Any) -> Any:
        outputs = training_step(*args, **kwargs)
        if outputs is None:
            return None
        _check_outputs(outputs)
        keep = observe(outputs["sample_loss"], outputs["timesteps"])
        return outputs if keep is None else {**outputs, "loss": masked_mean(outputs["sample_loss"], keep)}

    with shadowed(module, "training_step", masked_training_step):
        yield


def _check_outputs(outputs: Any) -> None:
    remedy = 'Return {"loss": ..., "sample_loss": (B,), "timesteps": (B,)}.'
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"AntiGradientControl expected a dict from `training_step`, but got {type(outputs).__name__}. {remedy}"
        )
    missing = [key for key in ("loss", "sample_loss", "timesteps") if key not in outputs]
    if missing:
        raise ValueError(
            f"AntiGradientControl expected the keys 'loss', 'sample_loss' and 'timesteps' from `training_step`,"
            f" but got {sorted(map(str, outputs))} without {missing}. {remedy}"
        )
    for key in ("sample_loss", "timesteps"):
        if not isinstance(outputs[key], Tensor):
            raise TypeError(f"Argument `{key}` expected a tensor, but got {type(outputs[key]).__name__}. {remedy}")
