"""What a user sees when something is wrong: one line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only

__all__ = ["TRACEBACK_VARIABLE", "fail", "one_line_errors"]

TRACEBACK_VARIABLE = "LIGHTNING_IET_TRACEBACK"

# Errors that speak of what the user gave. Others are bugs of ours, and their traceback is what a report needs.
_USERS = (ValueError, TypeError, OSError, ImportError, MisconfigurationException)


def fail(program: str, message: str) -> NoReturn:
    """Print an error as one line, on the first process only, and exit with status 2.

    Args:
        program: Name before the message.
        message: What was wrong, what was expected, what to do.
    """
    if getattr(rank_zero_only, "rank", 0) in (0, None):
        text = " ".join(message.split())
        print(f"{program}: error: {text} ({TRACEBACK_VARIABLE}=1 shows the traceback.)", file=sys.stderr)
    sys.exit(2)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Print a user's error as one line and exit with status 2; the traceback only when asked for.

    Args:
        program: Name before the message.
    """
    try:
        yield
    except _USERS as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        fail(program, str(error) or type(error).__name__)
    except KeyboardInterrupt:
        sys.exit(130)
