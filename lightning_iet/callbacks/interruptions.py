"""Interrupted runs: stop at a signal, close after an exception, resume from a checkpoint."""

import logging
import signal
import threading
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_iet.utilities.checkpoints import outline
from lightning_iet.utilities.lightning import Callback, patched_attribute


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

    return patched_attribute(trainer, "save_checkpoint", save_checkpoint)


class Resumption(pl.Callback):
    """Refuses to train when processes have found different last checkpoints, and sees that epochs are counted right.

    Each process looks for itself. A network file system may show one of them an older state of the folder, or a process
    of the attempt before may still be writing; and shards of two moments must not be mixed.

    Args:
        path: The checkpoint from which this process is about to start; ``None`` = none.
    """

    def __init__(self, path: str | Path | None) -> None:
        step = outline(Path(path), argument="ckpt_path")["global_step"] if path else None
        self.start = "none" if path is None else f"'{path}' of step {step}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare before anything is loaded.

        Raises:
            MisconfigurationException: On all processes, naming what two of them found.
        """
        if trainer.world_size == 1:
            return
        everyone: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(everyone, self.start)
        for rank, start in enumerate(everyone):
            if start != everyone[0]:
                raise MisconfigurationException(
                    f"All processes expected the same last checkpoint, but got {everyone[0]} on process 0 and {start} "
                    f"on process {rank}. Wait until no process of the attempt before is alive and the shared folder "
                    "shows all machines the same files, then start again."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :func:`begin_next_epoch`."""
        begin_next_epoch(trainer)


def begin_next_epoch(trainer: Trainer) -> None:
    """Let a run whose checkpoint is of the last step of an epoch begin the next one properly.

    Lightning (2.6) rightly counts the epoch of such a checkpoint as done, and then takes the next one for a continued
    one: it neither counts that it begins nor calls ``on_train_epoch_start``. A checkpoint of that epoch then says that
    the run stands between two epochs, and whoever goes on from it trains on the wrong batches. To be called in
    ``on_train_start``; does nothing anywhere else in an epoch, nor in a run that starts afresh.

    Args:
        trainer: A trainer that is about to train.
    """
    loop = trainer.fit_loop
    if loop.restarted_mid_epoch and loop.epoch_progress.current.ready == trainer.current_epoch:  # epochs begun and done
        loop.reset_restart_stage()
