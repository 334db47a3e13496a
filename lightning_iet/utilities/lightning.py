"""Lightning under both of its names: ``import lightning`` and ``import pytorch_lightning``."""

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import lightning.pytorch as pl

__all__ = ["Callback"]

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
