"""An end at the request of the machine: after a step, on all processes at once, with a whole checkpoint."""

import signal
import threading
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["StopSignal"]


class StopSignal(pl.Callback):
    """Ends training after the step in which any process was sent SIGTERM, as batch systems and torchrun send it.

    Lightning by itself lets the processes talk to one another from within the handler of the signal, in the middle of
    whatever they do, and each leave when it notices: they can wait for one another for ever, and a checkpoint that they
    write on the way lacks the shards of those who have left. Here the handler takes a note; after every step all
    processes vote (one number each), and if one has got the signal, all write the checkpoint and leave together.

    The checkpoint is that of every checkpoint callback with ``save_on_exception=True``.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handler."""
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            self._before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._take_note)}

    def _take_note(self, number: int, frame: object) -> None:
        if not self.asked:
            # The workers of a loader have got the same signal; torch would raise an error in mid-step when they go.
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self.asked = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Vote.

        Raises:
            SIGTERMException: On all processes, if one was asked to stop.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # a window of accumulated gradients is finished first
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            stop = SIGTERMException(128 + signal.SIGTERM)
            # A process may have failed on its way here: then no checkpoint can hold all shards at one step.
            if trainer.strategy.reduce_boolean_decision(True, all=True):
                for callback in trainer.checkpoint_callbacks:
                    callback.on_exception(trainer, pl_module, stop)
            rank_zero_info(f"Stopped by SIGTERM after step {trainer.global_step}.")
            raise stop

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the signal as it was."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the signal as it was. After a failure on the way to the vote, take part in it: others wait there."""
        if self.asked and isinstance(exception, Exception) and trainer.world_size > 1:
            with suppress(Exception):  # others may have gone
                trainer.strategy.reduce_boolean_decision(True, all=False)
                trainer.strategy.reduce_boolean_decision(False, all=True)
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
