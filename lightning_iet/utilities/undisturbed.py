"""Using a model in the middle of training without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_iet.utilities.random import isolated_rng

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(module: nn.Module, *, seed: int = 0) -> Iterator[None]:
    """Puts random generators and training modes back, so that training takes the course it would have taken.

    Args:
        module: its parts are as they were in the end, each in training or evaluation mode.
        seed: of the random generators inside the block.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with undisturbed(model):
        ...     _ = model.eval()
        >>> model.training, model[0].training, model[1].training
        (True, True, False)
    """
    modes = {part: part.training for part in module.modules()}
    try:
        with isolated_rng(seed=seed):
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
