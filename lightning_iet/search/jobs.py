"""Runs of a sweep: each is a process, several at a time."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

PROGRAM = "lightning-iet"
Started: TypeAlias = Callable[["subprocess.Popen[bytes]"], object]
_LOG = "output.log"


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
        """Whether the run has left its result."""
        return (self.folder / self.result).is_file()

    def run(self, *, threads: int, started: Started = lambda _: None) -> str | None:
        """Run to the end; files of an interrupted run are removed first.

        Args:
            threads: that the program may use, unless ``OMP_NUM_THREADS`` is set.
            started: called with the process.

        Returns:
            ``None``, or the last line of a failed run's output.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        log = self.folder.with_suffix(f"{self.folder.suffix}.log")
        # The same Python, whatever the path finds first.
        program = [sys.executable, "-m", "lightning_iet"] if self.command[0] == PROGRAM else [self.command[0]]
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
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
            return None
        output = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
        return f"{output[-1] if output else f'exit status {status}'} (see {log})"


def _place(folder: Path) -> list[str]:
    """Options that send a run's files to a folder, whichever loggers its configuration names."""
    return [
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={folder.parent}",
        "--trainer.logger.name=",
        f"--trainer.logger.version={folder.name}",
    ]


def run_jobs(jobs: Iterable[Job], number: int, *, ended: Callable[[Job, str | None], object]) -> None:
    """Run jobs, ``number`` at a time, each on its part of the cores; an exception ends those that run.

    Args:
        jobs: the next is taken when a process is free.
        number: of jobs at a time.
        ended: called with each job when it has ended, and with ``None`` or its error.
    """
    threads = threads_of_a_job(number)
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
                running[pool.submit(job.run, threads=threads, started=started)] = job
                if len(running) == number:
                    _collect(running, ended)
            while running:
                _collect(running, ended)
        except BaseException:
            stopped.set()
            for process in processes:
                process.terminate()
            raise


def threads_of_a_job(number: int) -> int:
    """Return the threads of each of a number of jobs at a time: what the user has set, else a part of the cores.

    Example:
        >>> threads_of_a_job(1000)
        1
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else max(1, (os.cpu_count() or 1) // number)


def _collect(running: dict[Future[str | None], Job], ended: Callable[[Job, str | None], object]) -> None:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        ended(running.pop(future), future.result())
