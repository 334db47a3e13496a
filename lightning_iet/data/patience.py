"""Worker processes of loaders that leave the end of a run to the process that they read for."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

__all__ = ["Patient"]


@dataclass(frozen=True)
class Patient:
    """A ``worker_init_fn`` after which a worker does not end at the first SIGTERM.

    Batch systems send that signal to all processes of a job. The main ones finish their step, for which they may need a
    batch that is not read yet. Workers end with their loader, or at a second signal.

    Args:
        init: The user's own ``worker_init_fn``, called as well.
    """

    init: Callable[[int], None] | None = None

    def __call__(self, worker: int) -> None:
        """Prepare a worker."""
        signal.signal(signal.SIGTERM, _wait_once)
        if self.init is not None:
            self.init(worker)


def _wait_once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, lambda *_: os._exit(128 + number))
