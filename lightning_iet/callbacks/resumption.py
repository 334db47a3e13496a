"""What a run needs that goes on from a checkpoint, again and again."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_iet.utilities.checkpoints import outline

__all__ = ["Resumption", "begin_next_epoch"]


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
