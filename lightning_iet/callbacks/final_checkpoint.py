"""The last checkpoint of a run holds its last step."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_iet.utilities.checkpoints import outline
from lightning_iet.utilities.lightning import Callback, Position
from lightning_iet.utilities.run_folders import LAST


class FinalCheckpoint(Callback):
    """Writes ``last.ckpt`` once more at the end of training, where the interval of checkpoints has left steps out.

    Lightning writes it after every ``every_n_epochs`` epochs, and at the end only if there is none yet: of 130 epochs
    with one checkpoint in 100, the last 30 would be lost. The command line adds this callback behind all others; only
    checkpoint callbacks with ``save_last=True``, or whose ``filename`` is ``last``, are looked at.
    """

    position = Position.EVALUATION

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the checkpoint after the last step of a run whose steps are limited; the epoch may go on elsewhere."""
        if 0 < trainer.max_steps <= trainer.global_step:
            _save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint after the last epoch."""
        epochs, is_step = trainer.max_epochs, 0 < trainer.max_steps <= trainer.global_step
        is_last = epochs is not None and 0 < epochs <= trainer.current_epoch + 1
        if (is_last or trainer.should_stop) and not is_step:
            _save(trainer)


def _save(trainer: Trainer) -> None:
    """Write the last checkpoints that do not hold this step; every process has to call this."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath and _keeps_last(callback):
            path = Path(callback.last_model_path or Path(callback.dirpath, LAST))
            step = -1
            if trainer.is_global_zero and path.is_file():
                step = outline(path, argument="ckpt_path", trusted=True).get("global_step", -1)
            if trainer.strategy.broadcast(step) != trainer.global_step:
                trainer.save_checkpoint(path, callback.save_weights_only)


def _keeps_last(callback: ModelCheckpoint) -> bool:
    return bool(callback.save_last) or callback.filename == Path(LAST).stem
