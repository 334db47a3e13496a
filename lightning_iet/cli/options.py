"""Errors name the option that a user types, where the functions behind a command name their argument."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from traceback import walk_tb

from lightning_iet.cli import COMMANDS

_NAMED = re.compile(r"Arguments? (?P<names>`\w+`(?:(?:,? and |, )`\w+`)*) ")
"""How all errors of this package begin that are about arguments."""

_MANY, _MORE = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


@contextmanager
def options_named(option_of: Callable[[str, BaseException], str | None]) -> Iterator[None]:
    """Let errors that name arguments name the options of the command line.

    Args:
        option_of: Returns the option of an argument, as a user types it, from the argument's name and the error;
            ``None`` where it has none.

    Example:
        >>> with options_named(lambda name, error: {"num_samples": "--num-samples"}.get(name)):
        ...     raise ValueError("Argument `num_samples` expected an integer ≥ 1, but got 0.")
        Traceback (most recent call last):
        ValueError: Option --num-samples expected an integer ≥ 1, but got 0.
    """
    try:
        yield
    except Exception as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            refused = error  # the name of an exception ends with its block

            def of_refused(name: str) -> str | None:
                return option_of(name, refused)

            error.args = (with_options(error.args[0], of_refused),)
        raise


def with_options(message: str, option_of: Callable[[str], str | None]) -> str:
    """Write options in the place of the arguments that an error names; other messages stay as they are.

    What follows the first names are arguments only where their options belong to the same group, or to none, and no
    command is called so.

    Args:
        message: Of an error.
        option_of: Returns the option of an argument; ``None`` where it has none.

    Example:
        >>> options = {"jobs": "--jobs", "out": "--out", "runs": "RUNS"}
        >>> with_options("Argument `out` expected a folder outside of `runs`.", options.get)
        'Option --out expected a folder outside of RUNS.'
        >>> with_options("Arguments `jobs` and `out` expected one of them.", options.get)
        'Options --jobs and --out expected one of them.'
        >>> with_options("Argument `out` expected a run of `fit`, not of `jobs`.", {**options, "fit": "--fit"}.get)
        'Option --out expected a run of `fit`, not of --jobs.'
        >>> with_options("Argument `runs` expected folders.", options.get)
        'RUNS expected folders.'
        >>> with_options("Argument `images` expected values in [0, 1].", options.get)
        'Argument `images` expected values in [0, 1].'
    """
    head = _NAMED.match(message)
    if head is None:
        return message
    names = re.findall(r"\w+", head["names"].replace(" and ", " "))
    options = [option_of(name) for name in names]
    if not all(options):
        return message

    commands = {name for group in COMMANDS.values() for name in group}
    groups = {f"{option}".rpartition(".")[0] for option in options} | {"", "--trainer"}

    def replaced(found: re.Match[str]) -> str:
        option = option_of(found[1]) or ""
        is_option = option.isupper() or (option.startswith("--") and option.rpartition(".")[0] in groups)
        return option if found[1] in names or (is_option and found[1] not in commands) else found[0]

    word = ("Option " if len(names) == 1 else "Options ") if all(f"{one}".startswith("--") for one in options) else ""
    return word + re.sub(r"`(\w+)`", replaced, message[head.start("names") :])


def option_of_owner(name: str, error: BaseException, parts: Mapping[type, str]) -> str | None:
    """Return the option of an argument by the object that has refused it.

    Args:
        name: Of the argument.
        error: As it was caught, with its traceback.
        parts: The prefix of the options of each class; of several that an object is an instance of, the first counts.

    Returns:
        The option of the innermost object in whose method the error arose, and whose class takes the argument.
    """
    for frame, _ in reversed(list(walk_tb(error.__traceback__))):
        owner = frame.f_locals.get("self")
        part = next((part for kind, part in parts.items() if isinstance(owner, kind)), None)
        if part is not None and name in arguments_of(type(owner)):
            return f"--{part}.{name}"
    return None


def arguments_of(kind: type) -> set[str]:
    """Return the names of the arguments of a class and of those it is derived from, which it may pass on.

    Example:
        >>> class Base:
        ...     def __init__(self, size: int) -> None: ...
        >>> class Own(Base):
        ...     def __init__(self, *, depth: int, **options: int) -> None: ...
        >>> sorted(arguments_of(Own))
        ['depth', 'size']
    """
    own = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base) and base is not object]
    found = [parameter for call in own for parameter in list(inspect.signature(call).parameters.values())[1:]]
    return {parameter.name for parameter in found if parameter.kind not in (_MANY, _MORE)}
