"""The end of a run of shards, also after an exception."""

import logging
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_iet.utilities.lightning import Callback
from lightning_iet.utilities.shadow import shadowed

__all__ = ["Closing", "checkpoints_refused"]

log = logging.getLogger(__name__)


class Closing(Callback):
    """Last in line: ends the averaging after an exception, when all others have seen it.

    Args:
        averaging: The callback whose ``teardown`` is to be called.
    """

    def __init__(self, averaging: Callback) -> None:
        self.averaging = averaging

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave an ordinary model and an ordinary strategy."""
        self.averaging.teardown(trainer, pl_module, "fit")


def checkpoints_refused(trainer: Trainer) -> AbstractContextManager[None]:
    """Lets ``trainer.save_checkpoint`` write nothing, and say so.

    After an exception in one of several processes, a checkpoint would wait for the others, or lack their shards; what
    it lacks would not be seen before somebody goes on from it.
    """

    def save_checkpoint(filepath: Any, *args: Any, **kwargs: Any) -> None:
        log.warning("No checkpoint '%s' after an exception in one of several processes: the last one counts.", filepath)

    return shadowed(trainer, "save_checkpoint", save_checkpoint)
