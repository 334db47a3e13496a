"""Lightning under both of its names, and its objects patched for a while."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import lightning.pytorch as pl

if TYPE_CHECKING or find_spec("pytorch_lightning") is None:

    class Callback(pl.Callback):
        """Base of this package's callbacks."""

else:
    import lightning_utilities.core.rank_zero as rank_zero

    # Whichever name is imported last takes the messages of both to its own logger; that is not for us to decide.
    logger = getattr(rank_zero, "log", None)
    imported_by_us = "pytorch_lightning" not in sys.modules
    import pytorch_lightning

    if imported_by_us:
        rank_zero.log = logger

    class Callback(pl.Callback, pytorch_lightning.Callback):
        """Base of this package's callbacks: one of either Lightning's, in Python and on the command line."""


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


_ABSENT = object()


@contextmanager
def shadowed(thing: object, name: str, replacement: object) -> Iterator[None]:
    """Let an entry of the instance's ``__dict__`` hide an attribute of any origin: class, instance or submodule.

    Example:
        >>> class Thing:
        ...     def name(self):
        ...         return "its own"
        >>> thing = Thing()
        >>> with shadowed(thing, "name", lambda: "another"):
        ...     thing.name()
        'another'
        >>> thing.name(), vars(thing)
        ('its own', {})
    """
    attributes = vars(thing)  # written directly: a plain function may not be assigned over a registered submodule
    before = attributes.get(name, _ABSENT)
    attributes[name] = replacement
    try:
        yield
    finally:
        if before is _ABSENT:
            attributes.pop(name, None)
        else:
            attributes[name] = before
