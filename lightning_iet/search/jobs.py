"""What runs several at a time: jobs of a sweep, workers for trial after trial; and how both are stopped."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_connections
from pathlib import Path
from threading import Thread
from typing import Any, Self, TypeAlias, cast

from lightning_iet.utilities.devices import become_a_job, environment_of_a_job, threads_of_a_job
from lightning_iet.utilities.errors import first_line
from lightning_iet.utilities.files import write_json

PROGRAM = "lightning-iet"
Started: TypeAlias = Callable[["subprocess.Popen[bytes]"], object]
_LOG, _COMMAND = "output.log", "command.json"


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Attributes:
        number: of its point.
        point: values by the names of options.
        command: the program and its arguments, without where the run's files go.
        folder: the run's folder.
        result: the file that a finished run leaves there.
    """

    number: int
    point: dict[str, Any]
    command: Sequence[str]
    folder: Path
    result: str

    @property
    def is_finished(self) -> bool:
        """Whether a run has left its result in the folder, by whatever command, see :func:`command_of`."""
        return (self.folder / self.result).is_file()

    def run(self, *, environment: Mapping[str, str], started: Started = lambda _: None) -> str | None:
        """Run to the end; files of an interrupted run are removed first.

        Args:
            environment: of the program, see :func:`~lightning_iet.utilities.devices.environment_of_a_job`.
            started: called with the process.

        Returns:
            ``None``, or the last line of a failed run's output.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        log = self.folder.with_suffix(f"{self.folder.suffix}.log")
        # The same Python, whatever the path finds first.
        program = [sys.executable, "-m", "lightning_iet"] if self.command[0] == PROGRAM else [self.command[0]]
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(  # noqa: S603 (the command of the user's file)
                [*program, *self.command[1:], *_place(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        started(process)
        status = process.wait()
        if status == 0 and self.is_finished:
            log.replace(self.folder / _LOG)
            write_json(self.folder / _COMMAND, list(self.command))
            return None
        output = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
        return f"{output[-1] if output else f'exit status {status}'} (see {log})"


def command_of(folder: Path) -> list[str] | None:
    """Return the command of a finished run; ``None`` of one that an earlier version has run, which kept none."""
    file = folder / _COMMAND
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _place(folder: Path) -> list[str]:
    """Options that send a run's files to a folder, whichever loggers its configuration names."""
    return [
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={folder.parent}",
        "--trainer.logger.name=",
        f"--trainer.logger.version={folder.name}",
    ]


def run_jobs(
    jobs: Iterable[Job],
    number: int,
    *,
    ended: Callable[[Job, str | None], object],
    waiting: Callable[[], object] | None = None,
) -> None:
    """Run jobs, ``number`` at a time, each on its part of the cores; an exception ends those that run.

    Args:
        jobs: the next is taken when a process is free.
        number: of jobs at a time.
        ended: called with each job when it has ended, and with ``None`` or its error.
        waiting: called once a second while jobs run.
    """
    environment = environment_of_a_job(number)
    running: dict[Future[str | None], Job] = {}
    processes: list[subprocess.Popen[bytes]] = []
    stopped = threading.Event()

    def started(process: "subprocess.Popen[bytes]") -> None:
        processes.append(process)
        if stopped.is_set():  # while it started
            process.terminate()

    with ThreadPoolExecutor(number) as pool:
        try:
            for job in jobs:
                running[pool.submit(job.run, environment=environment, started=started)] = job
                if len(running) == number:
                    _collect(running, ended, waiting)
            while running:
                _collect(running, ended, waiting)
        except BaseException:
            stopped.set()
            for process in processes:
                process.terminate()
            raise


def _collect(
    running: dict[Future[str | None], Job],
    ended: Callable[[Job, str | None], object],
    waiting: Callable[[], object] | None,
) -> None:
    done: set[Future[str | None]] = set()
    while not done:
        if waiting is not None:
            waiting()
        done, _ = wait(running, timeout=None if waiting is None else _LOOK_AGAIN, return_when=FIRST_COMPLETED)
    for future in done:
        ended(running.pop(future), future.result())


_LOOK_AGAIN = 1.0  # seconds until those who wait see how far jobs are
_CONTEXT = get_context("spawn")  # threads and accelerators do not survive a fork


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Attributes:
        task: what the function was called with.
        value: what it returned; None if it failed.
        error: why it failed, one line; empty if it did not.
        seconds: that it took.
    """

    task: Any
    value: Any
    error: str
    seconds: float


class Workers:
    """Calls a function for several tasks at a time, each in a process that serves for task after task.

    With one job the function is called in this process, as :meth:`start` is. A process that dies fails its own task
    only; another takes its place. Processes end with this one, also if it is killed.

    Args:
        function: called with a task; for several jobs one that :mod:`pickle` takes.
        jobs: tasks at a time, each on its part of the cores.

    Raises:
        ValueError: if a function for several jobs cannot be pickled.

    Example:
        >>> with Workers(len, jobs=1) as workers:
        ...     workers.start("four")
        ...     [outcome.value for outcome in workers.finished()]
        [4]
    """

    def __init__(self, function: Callable[[Any], Any], jobs: int) -> None:
        self._function, self._jobs = function, jobs
        self._ready: list[Outcome] = []
        self._idle: list[_Process] = []
        self._busy: dict[Connection, tuple[_Process, Any, float]] = {}
        if jobs > 1:
            try:
                pickle.dumps(function)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"Argument `jobs` expected 1 for a function that other processes cannot import, but got {jobs} "
                    f"({first_line(error)}). Define the function in a module, outside of others."
                ) from error

    @property
    def is_free(self) -> bool:
        """Whether another task can start."""
        return len(self._busy) + len(self._ready) < self._jobs

    @property
    def is_busy(self) -> bool:
        """Whether a task runs, or has ended and was not collected."""
        return bool(self._busy or self._ready)

    def start(self, task: Any) -> None:
        """Start a task; with one job, return when it has ended."""
        begin = time.monotonic()
        if self._jobs == 1:
            value, error = _call(self._function, task)
            self._ready.append(Outcome(task, value, error, time.monotonic() - begin))
            return
        process = self._idle.pop() if self._idle else _Process(self._function, threads_of_a_job(self._jobs))
        process.connection.send(task)
        self._busy[process.connection] = (process, task, begin)

    def finished(self) -> Iterator[Outcome]:
        """Yield tasks that have ended; wait for one if there is none."""
        if not self._ready and self._busy:
            for ready in wait_for_connections(list(self._busy)):
                process, task, begin = self._busy.pop(cast("Connection", ready))
                try:
                    value, error = process.connection.recv()
                    self._idle.append(process)
                except (EOFError, OSError):
                    process.end()
                    value, error = None, f"its process ended with status {process.status} (out of memory?)"
                self._ready.append(Outcome(task, value, error, time.monotonic() - begin))
        while self._ready:
            yield self._ready.pop(0)

    def __enter__(self) -> Self:
        """Return itself: processes are started when they are needed."""
        return self

    def __exit__(self, *error: object) -> None:
        """End all processes, with whatever they are doing."""
        for process in (*self._idle, *(process for process, _, _ in self._busy.values())):
            process.end()


class _Process:
    """A process that waits for tasks at the other end of a connection."""

    def __init__(self, function: Callable[[Any], Any], threads: int) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, function, threads))
        self._process.start()
        theirs.close()

    @property
    def status(self) -> int | None:
        return self._process.exitcode

    def end(self) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Connection, function: Callable[[Any], Any], threads: int) -> None:
    """Answer tasks until the other end is closed."""
    become_a_job(threads)
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            connection.send(_call(function, connection.recv()))
    except (EOFError, OSError, KeyboardInterrupt):
        return


def _end_with_parent() -> None:
    """Leave at once when the program that hands out tasks is killed: its successor begins the same trial anew."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(function: Callable[[Any], Any], task: Any) -> tuple[Any, str]:
    """Return a value and no error, or no value and the error's line."""
    try:
        return function(task), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Take SIGTERM, as batch systems and ``kill`` send it, for Ctrl-C: both raise ``KeyboardInterrupt``.

    Only the main thread hears signals; in another, what the program does with them stays as it is.

    Example:
        >>> before = signal.getsignal(signal.SIGTERM)
        >>> try:
        ...     with interrupted_by_sigterm():
        ...         signal.raise_signal(signal.SIGTERM)
        ... except KeyboardInterrupt:
        ...     print("interrupted")
        interrupted
        >>> signal.getsignal(signal.SIGTERM) is before
        True
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
