"""Bars that say how much is done and how long the rest will take."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import rich
import rich.progress as bars

from lightning_iet.audit.processes import rank

__all__ = ["Progress", "part_of", "progress_bar"]

Progress: TypeAlias = Callable[[int], None]


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Progress]:
    """Show a bar on the first process while a block runs; it goes when the block ends.

    Args:
        description: what is being done.
        total: number of images.

    Yields:
        A function that takes how many are done so far.
    """
    done = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn())
    time = (bars.TimeElapsedColumn(), bars.TextColumn("elapsed, left"), bars.TimeRemainingColumn())
    console = rich.get_console()
    hidden = rank() > 0 or not console.is_terminal
    with bars.Progress(*done, *time, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=done)


def part_of(progress: Progress, *, start: float, scale: float) -> Progress:
    """Show a part of some work as progress of the whole.

    Args:
        progress: takes how much of the whole is done.
        start: how much of the whole is done when the part begins.
        scale: how much of the whole a step of the part is.

    Returns:
        A function that takes how much of the part is done.

    Example:
        >>> part_of(print, start=100, scale=0.5)(10)
        105
    """
    return lambda done: progress(int(start + scale * done))
