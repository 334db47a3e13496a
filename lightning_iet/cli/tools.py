"""Functions as commands: their arguments are the options, their docstrings the help."""

import inspect
import json
import re
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NoReturn, cast

from jsonargparse import ArgumentParser

from lightning_iet.cli import PROGRAM
from lightning_iet.cli.arguments import options_named
from lightning_iet.cli.help import HelpFormatter, OneLineErrors, check_dashes, plain
from lightning_iet.utilities.errors import fail

_BOOLEANS = ("true", "false", "yes", "no")
_FORMER = {
    "count": "trials",
    "num": "num_samples",
    "pairs": "num_pairs",
    "resize": "image_size",
    "weights": "feature_weights",
    "workers": "num_workers",
}
"""What options were called before all tools had one style of names; scripts that give them go on working."""
_OPTIONS_OF_FIT = {"ckpt_path": "ckpt"}
"""What `fit` calls the same; it may be given to the tools as well."""
_FIRST_WORD = ("ckpt", "name")  # arguments that may be given as the first word, without their option


class _ToolParser(OneLineErrors, ArgumentParser):
    """Shows options with dashes, though they are named after the arguments of a function."""

    def known_options(self) -> list[str]:
        """Return all options, as a user writes them."""
        return [with_dashes(option) for option in super().known_options()]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message with options as a user writes them, and exit with status 2."""
        for action in self._actions:
            if not action.option_strings and f"required: {action.dest}" in message:
                fail(PROGRAM, f"`{self.prog}` expected one or more {action.metavar}, but got none.")
        super().error(re.sub(r"(?<=required: )[\w., ]+|--\w+|(?<=key \")\w+", with_dashes, message), ex)

    def format_help(self) -> str:
        """Return the help."""
        text = super().format_help().replace("<class 'Path'>", "Path")
        return re.sub(r"--\w+", with_dashes, text)


def with_dashes(option: str | re.Match[str]) -> str:
    """Write an option as a user does.

    Example:
        >>> with_dashes("--held_out")
        '--held-out'
    """
    return (option if isinstance(option, str) else option[0]).replace("_", "-")


def run_tool(tool: Callable[..., object], args: Sequence[str]) -> None:
    """Run a function as a command: a sequence as positional arguments, everything else as options.

    Options are written with dashes or with underscores. A switch alone means true, with ``no-`` before it false, and
    the values of a sequence follow one another: ``--held-out DIR --strict --no-show-images --objectives
    fid memorized_fraction``. If the result has an ``exit_status`` other than 0, the program ends with it.

    Args:
        tool: The function; its docstring and type hints are the command's help.
        args: Command-line arguments after the command's name.
    """
    documentation = inspect.getdoc(tool) or ""
    program = f"{PROGRAM} {tool.__name__.replace('_', '-')}"
    parser = _ToolParser(
        prog=program,
        description=plain(documentation.partition("\nArgs:")[0]),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parameters = inspect.signature(tool).parameters
    positional = {name for name, parameter in parameters.items() if parameter.annotation == Sequence[Path]}
    for name in positional:
        explained = re.search(rf"^ +{name}: (.+)", documentation, re.MULTILINE)
        text = plain(explained[1]) if explained else "one or more"
        parser.add_argument(name, nargs="+", type=Path, metavar=name.upper(), help=text)
    parser.add_function_arguments(tool, skip=positional, as_group=False)
    args = [_renamed(argument, parameters) for argument in args]
    check_dashes(args, parser.known_options())
    first = next((name for name in _FIRST_WORD if name in parameters), None)
    if first is not None and args and not args[0].startswith("-"):
        args = [f"--{first}", *args]
    options = {name: name.upper() if name in positional else with_dashes(f"--{name}") for name in parameters}
    of_config = "config" in parameters
    with options_named(lambda name, _: options.get(name, f"`{name}` of the configuration" if of_config else None)):
        result = tool(**parser.parse_args(_as_parsed(args, parser.get_defaults().as_dict())).as_dict())
    status = getattr(result, "exit_status", 0)
    if status:
        sys.exit(status)


def _renamed(argument: str, parameters: Container[str]) -> str:
    """Write an option by the name that it has today, and say so where a user has given a former one.

    Example:
        >>> _renamed("--workers=0", {"num_workers": None})
        '--num-workers=0'
        >>> _renamed("--weights", {"ckpt": None})
        '--weights'
        >>> _renamed("--ckpt_path=run", {"ckpt": None})
        '--ckpt=run'
    """
    name, equals, value = argument.partition("=")
    former = name[2:].replace("-", "_") if name.startswith("--") else ""
    if former not in parameters and _OPTIONS_OF_FIT.get(former, "") in parameters:
        return f"--{_OPTIONS_OF_FIT[former]}{equals}{value}"
    today = _FORMER.get(former, "")
    if former in parameters or today not in parameters:
        return argument
    option = with_dashes(f"--{today}")
    print(f"{PROGRAM}: {name} is called {option} today.", file=sys.stderr)
    return f"{option}{equals}{value}"


def _as_parsed(args: Sequence[str], defaults: Mapping[str, object]) -> list[str]:
    """Write options as the parser knows them.

    Example:
        >>> _as_parsed(["--strict", "--no-show-images"], {"strict": False, "show_images": True})
        ['--strict', 'true', '--show_images', 'false']
        >>> _as_parsed(["--held-out", "a-b"], {})
        ['--held_out', 'a-b']
        >>> _as_parsed(["--lr", "1e-5", "1e-3", "--jobs", "2"], {"lr": (0.0, 1.0)})
        ['--lr', '[1e-5, 1e-3]', '--jobs', '2']
    """
    found: list[str] = []
    taken = 0  # position of the first argument that is no value of the last option
    for position, argument in enumerate(args):
        if position < taken:
            continue
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            found.append(argument)
            continue
        key = name[2:].replace("-", "_")
        if not equals and key not in defaults and defaults.get(key.removeprefix("no_")) is True:
            found += [f"--{key.removeprefix('no_')}", "false"]
            continue
        found.append(f"--{key}{equals}{value}")
        values = list(takewhile(lambda word: not word.startswith("--"), args[position + 1 :]))
        if isinstance(defaults.get(key), list | tuple) and not equals and values and not values[0].startswith("["):
            known = cast("Sequence[object]", defaults[key])
            words = all(isinstance(value, str) for value in known)  # a mask is no number
            found.append(json.dumps(values) if words else f"[{', '.join(values)}]")
            taken = position + 1 + len(values)
            continue
        following = "".join(args[position + 1 : position + 2]).lower()
        alone = not equals and following not in _BOOLEANS and not re.fullmatch(r"[\d.]+(e-?\d+)?", following)
        if alone and isinstance(defaults.get(key), bool):
            found.append("true")
    return found
