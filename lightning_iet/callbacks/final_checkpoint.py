"""The last checkpoint of a run holds its last step."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lightning_iet.utilities.lightning import Position, find_callbacks, patched_attribute
from lightning_iet.utilities.run_folders import LAST


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

    Args:
        trainer: Of the run.
        is_end: Whether no checkpoint callback acts after this one. Else they get to know the file, but not that this
            step is saved: a validation may follow, after which they keep the best.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for callback in find_callbacks(trainer, ModelCheckpoint):
        if not _keeps_last(callback) or callback._last_global_step_saved == trainer.global_step:
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


def _keeps_last(callback: ModelCheckpoint) -> bool:
    return bool(callback.save_last) or (callback.filename == Path(LAST).stem and callback.monitor is None)
