"""What a user sees when something is wrong: one line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["TRACEBACK_VARIABLE", "one_line_errors"]

TRACEBACK_VARIABLE = "LIGHTNING_IET_TRACEBACK"

# Errors that speak of what the user gave. Others are bugs of ours, and their traceback is what a report needs.
_USERS = (ValueError, TypeError, OSError, ImportError, MisconfigurationException)


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
        if rank_zero_only.rank == 0:
            text = " ".join(str(error).split()) or type(error).__name__
            print(f"{program}: error: {text} (Set {TRACEBACK_VARIABLE}=1 for the traceback.)", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
