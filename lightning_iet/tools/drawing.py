"""Generated images, drawn by all processes of a run together."""

from collections.abc import Callable
from math import ceil

import lightning.pytorch as pl
import rich
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

__all__ = ["draw_images", "finish_training_bar"]


def draw_images(
    trainer: pl.Trainer, sample: Callable[..., Tensor], num: int, *, batch_size: int, device: torch.device
) -> Tensor:
    """Draws images in equal parts on all processes, with a progress bar on the first.

    Args:
        trainer: its strategy gathers the parts; without a progress bar of its own there is none here either.
        sample: ``sample(num, start=…, batch_size=…) -> (num, C, H, W)`` in [0, 1], where image i depends on
            ``start + i`` alone, so that the result does not depend on the number of processes.
        num: number of images.
        batch_size: at most so many images at once.
        device: where a process' part is gathered from.

    Returns:
        All images on every process, ``(num, C, H, W)`` on the CPU.

    Example:
        >>> trainer = pl.Trainer(accelerator="cpu", enable_progress_bar=False, logger=False)
        >>> count = lambda num, *, start, batch_size: torch.arange(start, start + num).view(-1, 1, 1, 1)
        >>> draw_images(trainer, count, 5, batch_size=2, device=torch.device("cpu")).flatten()
        tensor([0, 1, 2, 3, 4])
    """
    part = ceil(num / trainer.world_size)  # equal parts; what is too much is cut off
    first = part * trainer.global_rank
    step = min(batch_size, ceil(part / 8))  # some steps, so that the time left can be told early
    batches = []
    with _progress_bar(trainer) as progress:
        task = progress.add_task("Drawing images", total=num)
        for start in range(first, first + part, step):
            batches.append(sample(min(step, first + part - start), start=start, batch_size=step))
            progress.advance(task, len(batches[-1]) * trainer.world_size)
            progress.refresh()  # inside a training bar that is still live, nobody else does
    drawn = torch.cat(batches).to(device)
    images = drawn.new_zeros(part * trainer.world_size, *drawn.shape[1:])
    images[first : first + part] = drawn
    # The sum over processes puts the parts together: the others have zeros there, and 0 + x is x.
    return trainer.strategy.reduce(images, reduce_op="sum")[:num].cpu()


def finish_training_bar(trainer: pl.Trainer) -> None:
    """Lets go of the terminal, where Lightning's rich bar would redraw itself under all that is still to be printed."""
    progress = getattr(trainer.progress_bar_callback, "progress", None)
    if isinstance(progress, Progress):
        progress.stop()


def _progress_bar(trainer: pl.Trainer) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TextColumn("elapsed, left"), TimeRemainingColumn())
    hidden = trainer.progress_bar_callback is None or not trainer.is_global_zero
    return Progress(*columns, *left, console=rich.get_console(), transient=True, disable=hidden)
