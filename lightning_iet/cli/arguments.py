"""Options as a user writes them: completed before anything heavy is imported, and named in errors about arguments."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from traceback import walk_tb

from lightning_iet.cli import COMMANDS, PROGRAM
from lightning_iet.tools.configs import find_configuration
from lightning_iet.utilities.files import CONFIG, checkpoint_of, file_beside, find_checkpoint

_SOURCES = ("--config", "-c", "--images", "--print_config")
_MODEL = ("--model", "--model.class_path")  # others that begin so change a model that a configuration names
_SPELT = ("--config", "--images", "--ckpt_path")  # for one of which a word with other letters may stand
_HELP = ("-h", "--help", "--help-all")
_CONFIG = ("-c", "--config")
_OF_A_CHECKPOINT = ("test", "validate")  # the commands that need one
_OF_CLASSES = ("model.optimizer", "model.scheduler", "model.unet", "trainer.logger")  # whose arguments may follow


def with_underscores(arguments: Iterable[str]) -> list[str]:
    """Write options as a configuration does, for a user may write them with dashes, as those of the tools.

    Only names of arguments change. What may be a key of a dictionary stays as it is: it may have dashes of its own.

    Example:
        >>> with_underscores(["fit", "--ckpt-path", "last", "--agc.min-weight=0.1", "--help-all", "a-b"])
        ['fit', '--ckpt_path', 'last', '--agc.min_weight=0.1', '--help-all', 'a-b']
        >>> with_underscores(["--trainer.logger.init_args.save-dir=a", "--trainer.logger.init_args.config.a-b=3"])
        ['--trainer.logger.init_args.save_dir=a', '--trainer.logger.init_args.config.a-b=3']
    """
    found = list[str]()
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_option = name.startswith("--") and name not in _HELP
        found.append(f"--{_with_underscores(name[2:])}{equals}{value}" if is_option else argument)
    return found


def _with_underscores(option: str) -> str:
    parts: list[str] = []
    for part in option.split("."):
        is_argument = len(parts) < 2 or parts[-1] == "init_args" or ".".join(parts) in _OF_CLASSES
        parts.append(part.replace("-", "_") if is_argument else part)
    return ".".join(parts)


def check_source(arguments: Sequence[str]) -> None:
    """Refuse a command without a configuration, images or a model; say which to try, and nothing that would fail.

    Raises:
        ValueError: If there is none of them.

    Example:
        >>> check_source(["fit", "--agc.threshold", "0.5"])
        Traceback (most recent call last):
        ...
        ValueError: `fit` expected a configuration, but got none. Try ...
    """
    names = [argument.partition("=")[0] for argument in arguments]
    if any(name in _HELP or _is_source(name) or name.endswith(".help") for name in names):
        return
    command = next((argument for argument in arguments if not argument.startswith("-")), "fit")
    word = arguments[1] if arguments[0] == command and len(arguments) > 1 else ""
    if word and not word.startswith("-"):  # otherwise it may be the value of an option
        raise ValueError(
            f"`{command}` expected options, but got '{word}'. "
            f"Did you mean `{PROGRAM} {command} {_options_of(word, command)}`?"
        )
    for name in names:
        if name.startswith("--") and name != "--ckpt_path" and (close := get_close_matches(name, _SPELT, 1, 0.85)):
            raise ValueError(f"There is no option {name}. Did you mean {close[0]}?")
    if command in _OF_A_CHECKPOINT and "--ckpt_path" in names:
        raise ValueError(
            f"`{command}` expected a configuration, but got none, and the checkpoint has no {CONFIG} beside it. "
            "Give the one that it was trained with: --config."
        )
    if command in _OF_A_CHECKPOINT:
        raise ValueError(
            f"`{command}` expected a trained model, but got none. Try `{PROGRAM} {command} --ckpt_path RUN_FOLDER`."
        )
    raise ValueError(
        f"`{command}` expected a configuration, but got none. Try `{PROGRAM} {command} --config digits/iet_agc`, which "
        f"needs no files (`{PROGRAM} configs` lists more), or `{PROGRAM} {command} --images FOLDER` for your images."
    )


def _options_of(word: str, command: str) -> str:
    """Return the options that a word without one was probably meant for: a checkpoint, images or a configuration."""
    place = Path(word)
    if word == "help" or _is_option(word, place):
        return f"--{word}"
    if place.suffix == ".ckpt" or find_checkpoint(place) is not None:
        config = _find_config(place)
        if config is not None and command in _OF_A_CHECKPOINT:
            return f"--ckpt_path {word}"
        return f"--config {config or 'CONFIG'} --ckpt_path {word}"
    if command in _OF_A_CHECKPOINT:
        return "--ckpt_path RUN_FOLDER" if place.is_dir() else f"--config {word} --ckpt_path RUN_FOLDER"
    return f"--images {word}" if place.is_dir() else f"--config {word}"


def _is_option(word: str, place: Path) -> bool:
    """Whether a word is an option without its dashes, and no file, such as epoch=9-step=90.ckpt."""
    name, equals, _ = word.partition("=")
    is_file = place.exists() or (place.suffix == ".ckpt" and name not in ("ckpt_path", "ckpt-path"))
    return bool(equals) and re.fullmatch(r"[A-Za-z_][\w.-]*", name) is not None and not is_file


def _find_config(place: Path) -> Path | None:
    """Return the configuration of a checkpoint, of a run's folder or of one of its versions; ``None`` without one."""
    checkpoint = place
    if place.is_dir():  # the version whose checkpoint is taken has the configuration too
        checkpoint = find_checkpoint(place) or place
    return place / CONFIG if (place / CONFIG).is_file() else file_beside(checkpoint, CONFIG)


def with_configurations(arguments: Iterable[str]) -> list[str]:
    """Write the paths of configurations in the place of their names.

    Raises:
        FileNotFoundError: If there is neither a file nor a configuration of a name.
        ValueError: If an option of a configuration has none.

    Example:
        >>> with_configurations(["fit", "--config", "digits/iet", "--trainer.max_epochs=1"])
        ['fit', '--config', '...iet.yaml', '--trainer.max_epochs=1']
        >>> with_configurations(["fit", "-cdigits/iet"])
        ['fit', '--config', '...iet.yaml']
    """
    found: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if found and found[-1] in _CONFIG:
            found.append(_configuration("" if argument.startswith("-") else argument))
        elif name in _CONFIG and equals:
            found.append(f"{name}={_configuration(value)}")
        elif re.match("-c.", argument):
            found += ["--config", _configuration(argument[2:])]
        else:
            found.append(argument)
    if found and found[-1] in _CONFIG:
        _configuration("")
    return found


def _configuration(name: str) -> str:
    if not name:
        raise ValueError(
            f"Option --config expected a file or a name, but got none. `{PROGRAM} configs` lists the names."
        )
    if Path(name).is_dir():
        raise ValueError(
            f"Option --config expected a file or a name, but got the folder '{name}'. "
            f"Did you mean {_options_of(name, 'fit')}?"
        )
    return str(find_configuration(name))


def with_run(arguments: Sequence[str]) -> list[str]:
    """Add the configuration of a run whose checkpoint is tested or validated, where none is given.

    Raises:
        FileNotFoundError: If the checkpoint is a folder that holds none.
        ValueError: If there is nothing behind ``--ckpt_path``.

    Example:
        >>> with_run(["test", "--ckpt_path", "nowhere.ckpt"])
        ['test', '--ckpt_path', 'nowhere.ckpt']
    """
    names = [argument.partition("=")[0] for argument in arguments]
    if not arguments or names[0] not in _OF_A_CHECKPOINT or "--ckpt_path" not in names or any(map(_is_source, names)):
        return list(arguments)
    position = names.index("--ckpt_path")
    _, equals, value = arguments[position].partition("=")
    text = value if equals else "".join(arguments[position + 1 : position + 2])
    if not text or text.startswith("-"):
        raise ValueError("Option --ckpt_path expected a checkpoint or the folder of a run, but got none.")
    place = Path(text)
    if place.is_dir() and find_checkpoint(place) is None:
        checkpoint_of(place, argument="ckpt_path")  # which says that none is there
    found = _find_config(place)
    return [arguments[0], *([] if found is None else ["--config", str(found)]), *arguments[1:]]


def _is_source(name: str) -> bool:
    """Whether an option names a source; one with a dash too few is answered by the trainer."""
    if not name.startswith("-"):
        return False
    return any(option.startswith(_SOURCES) or option in _MODEL for option in (name, f"-{name}"))


# --- errors name the option that a user types, where the functions behind a command name their argument ---------------

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
