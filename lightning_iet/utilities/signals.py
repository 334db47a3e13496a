"""What a long job does when it is asked to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
