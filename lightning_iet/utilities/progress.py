"""One kind of progress bar, by rich; lines where there is no terminal."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import rich
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lightning_iet.utilities.text import in_words, say

LINE_SECONDS = 30.0
"""Least time between two lines about the same work."""

SPEED_SECONDS = 3600.0
"""Time over which a bar averages the speed, by which it estimates what is left: a run may take minutes."""

_begun: dict[str, float] = {}  # when work of a description was last said to begin


class Bar:
    """What :func:`progress_bar` yields; this one shows lines alone."""

    def show(self, completed: int) -> None:
        """Show that so many are done in all."""

    def advance(self, count: int = 1) -> None:
        """Show that so many more are done."""

    def say(self, line: str, *, style: str | None = None) -> None:
        """Print a line, above the bar where there is one."""
        say(line, style=style)


class _Hidden(Bar):
    """Shows nothing."""

    def say(self, line: str, *, style: str | None = None) -> None:
        pass


class _TerminalBar(Bar):
    """A bar of rich."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def show(self, completed: int) -> None:
        self._progress.update(self._task, completed=completed)
        self._progress.refresh()  # inside the bar of a training, which is still live, nothing else redraws this one

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)
        self._progress.refresh()

    def say(self, line: str, *, style: str | None = None) -> None:
        self._progress.console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


class _Lines(Bar):
    """Lines on standard error: one after every tenth, at most one in half a minute."""

    def __init__(self, description: str, total: int | None, *, completed: int, is_slow: bool) -> None:
        self._description, self._total, self._before = description, total, completed
        self._start = self._written = time.monotonic()
        self._done = self._said = completed
        # Work of a moment that is done again and again, such as an evaluation after each epoch, is not said each time.
        if is_slow and self._start - _begun.get(description, -LINE_SECONDS) >= LINE_SECONDS:
            _begun[description] = self._start
            self._write("begins" if total is None else f"{completed:,} of {total:,}")

    def show(self, completed: int) -> None:
        # Several processes draw parts of one size, in all some more than were asked for.
        self._done, now = completed if self._total is None else min(completed, self._total), time.monotonic()
        if now - self._written < LINE_SECONDS or self._done - self._said < max(1, (self._total or 0) / 10):
            return
        self._written, self._said = now, self._done
        elapsed = now - self._start
        if self._total is None:
            self._write(f"{self._done:,} done in {in_words(elapsed)}")
        else:
            left = elapsed / (self._done - self._before) * (self._total - self._done)
            self._write(f"{self._done:,} of {self._total:,}, about {in_words(left)} left")

    def advance(self, count: int = 1) -> None:
        self.show(self._done + count)

    def _write(self, text: str) -> None:
        print(f"{self._description}: {text}", file=sys.stderr, flush=True)


@contextmanager
def progress_bar(
    description: str,
    total: int | None,
    *,
    completed: int = 0,
    hidden: bool = False,
    is_slow: bool = False,
    console: Console | None = None,
) -> Iterator[Bar]:
    """Show a progress bar while a block runs; it disappears when the block ends.

    Where standard output is no terminal, such as a file, lines on standard error take its place, which tell now and
    then how much is done and how long the rest will take; none, where all is done in half a minute. A notebook shows
    nothing.

    Args:
        description: What is being done.
        total: Number of images, steps or runs; ``None`` = not known.
        completed: How many of them an earlier call has done, which say nothing of the time that is left.
        hidden: Show nothing, as processes other than the first do.
        is_slow: Whether a first part may take minutes, so that the beginning is a line, too.
        console: Where the bar is, by default rich's own console, which follows ``sys.stdout``.
    """
    console = rich.get_console() if console is None else console
    if hidden or console.is_jupyter:
        yield _Hidden() if hidden else Bar()
        return
    if not console.is_terminal:
        yield _Lines(description, total, completed=completed, is_slow=is_slow)
        return
    done = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    time_ = (TimeElapsedColumn(), TextColumn("elapsed, left"), TimeRemainingColumn())
    columns = (*done, *time_)
    with Progress(*columns, console=console, transient=True, speed_estimate_period=SPEED_SECONDS) as progress:
        yield _TerminalBar(progress, progress.add_task(description, total=total, completed=completed))
