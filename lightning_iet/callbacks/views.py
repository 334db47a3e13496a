"""Looking at a model in the middle of training without leaving a trace."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import lightning.pytorch as pl
from torch import nn

from lightning_iet.callbacks.parameter_averaging import ParameterAveragingCallback
from lightning_iet.utilities.random import isolated_rng

__all__ = ["average_of_shards", "undisturbed"]


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Puts random generators and training modes back, so that training takes the course it would have taken.

    Args:
        module: its parts are as they were in the end, each in training or evaluation mode.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with undisturbed(model):
        ...     _ = model.eval()
        >>> model.training, model[0].training, model[1].training
        (True, True, False)
    """
    modes = {part: part.training for part in module.modules()}
    try:
        with isolated_rng(seed=0):
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def average_of_shards(trainer: pl.Trainer) -> Iterator[None]:
    """Lets the model show the average of the shard models, also where a round is still going on.

    Args:
        trainer: a trainer at work; without :class:`ParameterAveragingCallback` nothing changes.
    """
    with ExitStack() as stack:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ParameterAveragingCallback) and callback.engine is not None:
                stack.enter_context(callback.engine.average_shown())
        yield
