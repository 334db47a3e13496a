"""Looking at a model in the middle of training without leaving a trace."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import lightning.pytorch as pl

from lightning_iet.callbacks.parameter_averaging import ParameterAveragingCallback
from lightning_iet.utilities.undisturbed import undisturbed

__all__ = ["average_of_shards", "undisturbed"]


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
