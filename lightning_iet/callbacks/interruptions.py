"""Runs that end before their time, and go on: the last checkpoint, the signal to stop, and resuming."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_iet.shards.groups import check_same_everywhere
from lightning_iet.utilities.checkpoints import last_checkpoint, use_atomic_checkpoints
from lightning_iet.utilities.files import CONFIG, LAST, find_checkpoint, run_folder
from lightning_iet.utilities.lightning import (
    Callback,
    Position,
    find_callback,
    find_callbacks,
    order_callbacks,
    patched_attribute,
)


class StopSignal(pl.Callback):
    """Ends training after the step in which any process was sent SIGTERM, as batch systems and torchrun send it.

    Lightning's own handler makes each process leave when it notices, in the middle of whatever it does: processes can
    wait for one another for ever, and a checkpoint that is written meanwhile lacks the shards of those that have left.
    Here the handler only sets a flag; after every step the processes exchange their flags (one number each), and if one
    is set, all write a checkpoint and leave together.

    The checkpoint is that of every checkpoint callback with ``save_on_exception=True``.
    """

    position = Position.STOP

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handler."""
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            self._before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._set_flag)}

    def _set_flag(self, number: int, frame: object) -> None:
        if not self.asked:
            # A loader's workers receive the signal too; when they end, torch would raise an error in mid-step.
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self.asked = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Exchange flags.

        Raises:
            SIGTERMException: On all processes, if one was asked to stop.
        """
        if trainer.fit_loop._should_accumulate():
            return  # the optimizer step comes first, after the last batch of an epoch at the latest
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            stop = SIGTERMException(128 + signal.SIGTERM)
            # If a process has failed since its last exchange, no checkpoint can hold all shards at one step.
            if trainer.strategy.reduce_boolean_decision(True, all=True):
                for callback in trainer.checkpoint_callbacks:
                    callback.on_exception(trainer, pl_module, stop)
            is_saved = find_checkpoint(run_folder(trainer)) is not None
            rank_zero_info(
                f"Stopped by SIGTERM after step {trainer.global_step}."
                + (" The same command with --ckpt_path last goes on from the last checkpoint." if is_saved else "")
            )
            raise stop

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the handlers."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the handlers; take part in the exchange for which the other processes wait, if this one failed."""
        if self.asked and isinstance(exception, Exception) and trainer.world_size > 1:
            with suppress(Exception):  # the others may have ended
                trainer.strategy.reduce_boolean_decision(True, all=False)
                trainer.strategy.reduce_boolean_decision(False, all=True)
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


@contextmanager
def final_evaluation(trainer: Trainer) -> Iterator[None]:
    """Let SIGTERM end the evaluation at the end of a run at once, and say how to get it later, for Ctrl-C too.

    The model is saved by then, and no process has to wait for the others, as :class:`StopSignal` does.

    Raises:
        SIGTERMException: With status 143, also if the signal came after the last step and before the evaluation.
    """
    stop = find_callback(trainer, StopSignal)
    try:
        if trainer.strategy.reduce_boolean_decision(stop is not None and stop.asked, all=False):
            raise SIGTERMException(128 + signal.SIGTERM)
        with ended_by_sigterm(trainer):
            yield
    except (KeyboardInterrupt, SIGTERMException):
        rank_zero_info(f"The evaluation was cut off. {_how_to_evaluate(trainer)}".rstrip())
        raise


@contextmanager
def ended_by_sigterm(trainer: Trainer) -> Iterator[None]:
    """Let SIGTERM end a block at once with status 143, in processes that the trainer has started, too.

    Lightning's own handler notes the signal and goes on until the next batch of data.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut off what is cleared away
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)
        raise SIGTERMException(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _how_to_evaluate(trainer: Trainer) -> str:
    """Say where the model of a run is, if it is saved, and the command that evaluates it, if there is one."""
    folder = run_folder(trainer)
    if find_checkpoint(folder) is None:
        return ""
    command = f" `lightning-iet test --ckpt_path {folder}` evaluates it." if (folder / CONFIG).is_file() else ""
    return f"The model is saved in '{folder}'.{command}"


class Resumption(Callback):
    """Refuses to train when processes start from different checkpoints, and corrects how Lightning counts epochs.

    Each process reads the checkpoint itself. A network file system may show one of them an older state of the folder,
    or a process of the previous attempt may still be writing; shards of two moments must not be mixed.
    """

    position = Position.RESUME

    def __init__(self) -> None:
        self._step: int | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the step of the checkpoint."""
        self._step = checkpoint.get("global_step")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the checkpoints.

        Raises:
            MisconfigurationException: On all processes, naming what two of them found.
        """
        path, step = trainer.ckpt_path, self._step
        check_same_everywhere(
            {"last checkpoint": "none" if path is None else f"'{path}' of step {step}"},
            trainer.world_size,
            remedy="Wait until no process of the previous attempt is running and the shared folder shows all machines "
            "the same files, then start again.",
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a run whose checkpoint is of the last step of an epoch begin the next epoch properly.

        Lightning (2.6) counts the epoch of such a checkpoint as done, and then takes the next one for a continued one:
        it neither counts its beginning nor calls ``on_train_epoch_start``. A checkpoint of that epoch would then say
        that the run is between two epochs, and a run resumed from it would train on the wrong batches.
        """
        loop = trainer.fit_loop
        if loop.restarted_mid_epoch and loop.epoch_progress.current.ready == trainer.current_epoch:
            loop.reset_restart_stage()


def resume_from(trainer: Trainer, ckpt_path: str | Path | None, *, trusted: bool = False) -> str | Path | None:
    """Prepare a trainer to write checkpoints and to go on from one; an interrupted run then ends in the same weights.

    The command line calls this, :class:`~lightning_iet.callbacks.ParameterAveragingCallback` calls it, and a program
    with a plain trainer should. Checkpoints are written atomically from then on, ``"last"`` becomes the newest whole
    checkpoint (:func:`~lightning_iet.utilities.checkpoints.last_checkpoint`), and a :class:`Resumption` is added to the
    callbacks.

    Args:
        trainer: A trainer that has not begun to train.
        ckpt_path: ``"last"``, any other path or word that ``trainer.fit`` takes, or ``None`` to start afresh.
        trusted: Whether checkpoints may run code when they are read: they are the user's own.

    Returns:
        What to pass to ``trainer.fit(…, ckpt_path=…, weights_only=not trusted)``.

    Raises:
        ValueError: For ``"last"``, if the run folder is a remote address, or there are checkpoints and none can be
            used.

    Example:
        >>> trainer = Trainer(logger=False, default_root_dir="nowhere", accelerator="cpu")
        >>> resume_from(trainer, "last") is None
        True
    """
    use_atomic_checkpoints(trainer)
    if find_callback(trainer, Resumption) is None:
        order_callbacks(trainer, Resumption())
    return last_checkpoint(trainer, trusted=trusted) if ckpt_path == "last" else ckpt_path


class FinalCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` once more at the end of training, where the interval of checkpoints has left steps out.

    Lightning writes it after every ``every_n_epochs`` epochs, and at the end only if there is none yet: of 130 epochs
    with one checkpoint in 100, the last 30 would be lost. The command line adds this callback behind all others; only
    checkpoint callbacks with ``save_last``, or whose ``filename`` is ``last`` and that monitor nothing, are looked at.
    They write the file themselves, so that they know of it.

    It is a checkpoint callback itself: Lightning calls these after an epoch behind all others, early stopping included.
    """

    position = Position.EVALUATION

    def __init__(self) -> None:
        self._step = -1  # after which it has written within an epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the checkpoint after the last step of a run that ends within an epoch, which may go on elsewhere."""
        if _is_last_step(trainer) and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            _save(trainer, is_end=False)
            self._step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint after the last epoch."""
        epochs = trainer.max_epochs
        is_last_epoch = epochs is not None and 0 < epochs <= trainer.current_epoch + 1
        is_last = is_last_epoch or trainer.should_stop or _is_last_step(trainer)
        if is_last and self._step != trainer.global_step:
            _save(trainer, is_end=True)


def _is_last_step(trainer: Trainer) -> bool:
    return 0 < trainer.max_steps <= trainer.global_step


def _save(trainer: Trainer, *, is_end: bool) -> None:
    """Write the last checkpoints that do not hold this step; every process has to call this.

    Unless ``is_end``, checkpoint callbacks get to know the file, but not that this step is saved: a validation may
    follow, after which they keep the best.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for callback in find_callbacks(trainer, ModelCheckpoint):
        keeps_last = callback.save_last or (callback.filename == Path(LAST).stem and callback.monitor is None)
        if not keeps_last or callback._last_global_step_saved == trainer.global_step:
            continue
        before = callback._last_global_step_saved
        _write(trainer, callback)
        if not is_end:
            callback._last_global_step_saved = before


def _write(trainer: Trainer, callback: ModelCheckpoint) -> None:
    measures = callback._monitor_candidates(trainer)
    if not callback.save_last:
        callback._save_topk_checkpoint(trainer, measures)
        return
    if trainer.is_global_zero and callback.last_model_path and Path(callback.last_model_path).is_symlink():
        Path(callback.last_model_path).unlink()  # or the checkpoint that it leads to would be overwritten
    with patched_attribute(callback, "save_last", True):  # "link" leads to the newest checkpoint, which is older
        callback._save_last_checkpoint(trainer, measures)
