"""One kind of progress bar, by rich."""

from collections.abc import Iterator
from contextlib import contextmanager

import rich
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bar:
    """A bar of :func:`progress_bar`."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def show(self, completed: int) -> None:
        """Show that so many are done in all."""
        self._progress.update(self._task, completed=completed)
        self._progress.refresh()  # inside the bar of a training, which is still live, nothing else redraws this one

    def advance(self, count: int = 1) -> None:
        """Show that so many more are done."""
        self._progress.advance(self._task, count)
        self._progress.refresh()


@contextmanager
def progress_bar(description: str, total: int | None, *, hidden: bool = False) -> Iterator[Bar]:
    """Show a progress bar while a block runs; it disappears when the block ends.

    Args:
        description: What is being done.
        total: Number of images, steps or runs; ``None`` = not known.
        hidden: Show nothing, as processes other than the first do. Nothing is shown either where standard output is
            no terminal.

    Yields:
        The bar, to be told how many are done.
    """
    done = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    time = (TimeElapsedColumn(), TextColumn("elapsed, left"), TimeRemainingColumn())
    console = rich.get_console()
    off = hidden or not console.is_terminal
    with Progress(*done, *time, console=console, transient=True, disable=off) as progress:
        yield Bar(progress, progress.add_task(description, total=total))
