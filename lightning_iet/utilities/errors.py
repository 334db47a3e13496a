"""Errors of a user in one line, and optional packages with a message that says how to get them."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from traceback import walk_tb
from types import ModuleType
from typing import NoReturn

TRACEBACK_VARIABLE = "LIGHTNING_IET_TRACEBACK"

# Errors about what the user gave. Others are bugs of ours, and a bug report needs their traceback.
_USERS = (ValueError, TypeError, OSError, ImportError)


def fail(program: str, message: str, *, everywhere: bool = False, unexpected: bool = False) -> NoReturn:
    """Print an error as one line and exit with status 2.

    Args:
        program: Name before the message.
        message: What was wrong, what was expected, what to do.
        everywhere: Whether every process prints, not only the first, which may be the one that is gone.
        unexpected: Whether the message may not say enough, so that it is told how to see the traceback.
    """
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")  # a tool may work without it
    rank = os.environ.get("RANK", "0") if lightning is None else getattr(lightning.rank_zero_only, "rank", 0) or 0
    if everywhere or int(rank) == 0:
        text = " ".join(message.split())
        hint = f" ({TRACEBACK_VARIABLE}=1 shows the traceback.)" if unexpected else ""
        print(f"{program}: error: {text}{hint}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Print a user's error as one line behind the program's name, and exit with status 2; a traceback if asked for."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        if is_connection_lost(error):
            fail(program, _lost(error), everywhere=True)
        if type(error).__module__.startswith("wandb") and "API key" in str(error):
            fail(program, "Weights & Biases has no API key. Run `wandb login`, or set WANDB_MODE=offline.")
        if not isinstance(error, _USERS) and type(error).__name__ != "MisconfigurationException":  # of either Lightning
            raise
        fail(program, str(error) or type(error).__name__, unexpected=not _is_ours(error))


@contextmanager
def arguments_called(**given: str) -> Iterator[None]:
    """Let errors name arguments as the caller's user has given them.

    Args:
        given: What the user calls an argument, by what the called function calls it.

    Example:
        >>> with arguments_called(weights="feature_weights"):
        ...     raise ValueError("Argument `weights` expected a file, but got a folder.")
        Traceback (most recent call last):
        ...
        ValueError: Argument `feature_weights` expected a file, but got a folder.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        for name, own in given.items():
            text = text.replace(f"`{name}`", f"`{own}`")
        if text == str(error):
            raise
        raise type(error)(text) from error


def own_cause(error: BaseException) -> BaseException | None:
    """Return what an argument of ours was refused with, among the causes of an error; ``None`` = it is none of ours.

    Example:
        >>> error = ValueError("Does not validate against any of the Union subtypes")
        >>> error.__cause__ = ValueError("Argument `k` expected an integer.")
        >>> own_cause(error)
        ValueError('Argument `k` expected an integer.')
    """
    cause: BaseException | None = error
    while cause is not None and not str(cause).startswith("Argument"):
        cause = cause.__cause__
    return cause


def _is_ours(error: BaseException) -> bool:
    """Whether an error was raised by this package, and not by a library that it calls."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("lightning_iet")


def first_line(error: BaseException) -> str:
    r"""What an error says, without what follows in further lines; its type, if it says nothing.

    Example:
        >>> first_line(KeyError()), first_line(ValueError("not here\nbut there"))
        ('KeyError', 'not here')
    """
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def yaml_fault(error: BaseException) -> str:
    r"""What is wrong in a YAML file, and where; the file's name is the caller's to say.

    Example:
        >>> import yaml
        >>> try:
        ...     yaml.safe_load("a: [1, 2\nb: 3")
        ... except yaml.YAMLError as error:
        ...     yaml_fault(error)
        "expected ',' or ']', but got ':' (line 2, column 2)"
    """
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return first_line(error)
    return f"{getattr(error, 'problem', None) or 'something else'} (line {mark.line + 1}, column {mark.column + 1})"


def is_connection_lost(error: BaseException) -> bool:
    """Whether an error says that another process of the run, or the network to it, is gone.

    Example:
        >>> is_connection_lost(RuntimeError("[…/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:4242"))
        True
        >>> is_connection_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        False
    """
    # gloo raises RuntimeError itself; NCCL, the store and the set-up of a process group have classes of their own.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def _lost(error: BaseException) -> str:
    reason = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip().splitlines()[0]).rstrip(". ")
    return (
        f"The connection to another process was lost ({reason}): it has ended, or the network is cut. "
        "Start the same command again, on all machines, with `--ckpt_path last`."
    )


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say which extra of this package brings it.

    Raises:
        ModuleNotFoundError: if it is not installed, with the line that installs it.

    Example:
        >>> require("math", "inception").sqrt(4.0)
        2.0
        >>> require("no_such_module", "inception")
        Traceback (most recent call last):
            ...
        ModuleNotFoundError: `no_such_module` is not installed. Run: pip install 'lightning-iet[inception]'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        message = f"`{missing}` is not installed. Run: pip install 'lightning-iet[{extra}]'"
        raise ModuleNotFoundError(message, name=missing) from error
