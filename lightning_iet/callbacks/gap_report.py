"""What is told of the gap between training losses and those of unseen images: figures by epoch, and a picture."""

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_iet.callbacks.gap_history import GapHistory
from lightning_iet.tools.charts import loss_gap
from lightning_iet.tools.figures import save_figure
from lightning_iet.tools.run_folder import run_folder

__all__ = ["gap_metrics", "log_gap", "publish_gap"]


def gap_metrics(epoch: GapHistory) -> tuple[Tensor | None, dict[str, float]]:
    """Figures of one epoch to log.

    Args:
        epoch: Holds that epoch only.

    Returns:
        The mean gap over all timesteps where both losses are known (None where nowhere), and training loss, unseen loss
        and skip rate by tenths of the timesteps, without those where nothing was seen.
    """
    gaps = epoch.gap()
    known = gaps[gaps.isfinite()]
    by_bin = {
        f"{name}/bin_{number}": value
        for name, (means,) in epoch.means().items()
        for number, value in enumerate(means.tolist())
        if value == value  # not NaN
    }
    return (known.mean().float() if len(known) else None), by_bin


def log_gap(trainer: pl.Trainer, module: pl.LightningModule, epoch: GapHistory, *, prefix: str) -> None:
    """Log the figures of an epoch; the gap also for the progress bar, and for callbacks that wait for it.

    Args:
        trainer: At the end of the epoch.
        module: Logs.
        epoch: Holds that epoch only; the same on all processes.
        prefix: Of the names.
    """
    gap, by_bin = gap_metrics(epoch)
    if gap is not None:
        module.log(f"{prefix}gap", gap, prog_bar=True)
    values = {f"{prefix}{name}": value for name, value in by_bin.items()}
    for logger in trainer.loggers:
        logger.log_metrics(values | {"epoch": trainer.current_epoch}, step=trainer.global_step)


def publish_gap(trainer: pl.Trainer, history: GapHistory, *, prefix: str, num_timesteps: int) -> None:
    """Draw the gap over time into the run folder, and for loggers that take pictures; nothing without a logger.

    Args:
        trainer: Its run folder, and its loggers.
        history: Of the run.
        prefix: Of the names of figures: ``agc/`` makes ``gap.png``, ``agc/model.unet/`` ``gap-model.unet.png``.
        num_timesteps: Of the noise schedule.
    """
    if not trainer.loggers or trainer.fast_dev_run or not len(history.rows):  # type: ignore[attr-defined]
        return
    figure = loss_gap(**history.means(), epochs_per_row=history.width, num_timesteps=num_timesteps)
    _, *which, _ = prefix.split("/")
    path = run_folder(trainer) / f"{'-'.join(['gap', *which])}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    rank_zero_info(f"AntiGradientControl: training and unseen losses over time are drawn in {path}")
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image(f"{prefix}gap", [str(path)])
