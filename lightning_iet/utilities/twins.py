"""Lightning's own classes under both of its names, to ask of an object of either which it is."""

import sys
from functools import cache
from importlib import import_module

import lightning_iet.utilities.lightning  # noqa: F401 (loads the other Lightning where there is one)

__all__ = ["twins"]


@cache
def twins(path: str) -> tuple[type, ...]:
    """The class of that name in each Lightning that is installed, for ``isinstance``.

    Args:
        path: Module and name of a class, below ``lightning.pytorch``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> isinstance(trainer.strategy, twins("strategies.SingleDeviceStrategy"))
        True
    """
    module, _, name = path.rpartition(".")
    packages = [package for package in ("lightning.pytorch", "pytorch_lightning") if package in sys.modules]
    return tuple(getattr(import_module(f"{package}.{module}".rstrip(".")), name) for package in packages)
