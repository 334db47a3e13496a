"""What a user has written on the command line of a trainer, before anything heavy is imported."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_iet.cli import PROGRAM
from lightning_iet.utilities.configurations import find_configuration
from lightning_iet.utilities.run_folders import CONFIG, checkpoint_of, find_checkpoint

_SOURCES = ("--config", "-c", "--model", "--images", "--print_config")
_HELP = ("-h", "--help", "--help-all")


def with_underscores(arguments: Iterable[str]) -> list[str]:
    """Write options as a configuration does, for a user may write them with dashes, as those of the tools.

    Example:
        >>> with_underscores(["fit", "--ckpt-path", "last", "--agc.min-weight=0.1", "--help-all", "a-b"])
        ['fit', '--ckpt_path', 'last', '--agc.min_weight=0.1', '--help-all', 'a-b']
    """
    found = list[str]()
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_option = name.startswith("--") and name not in _HELP
        found.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if is_option else argument)
    return found


def check_source(arguments: Sequence[str]) -> None:
    """Refuse a command without a configuration, images or a model; say which to try.

    Args:
        arguments: The command, and all after it.

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
        option = "--images" if Path(word).is_dir() else "--config"
        raise ValueError(
            f"`{command}` expected options, but got '{word}'. Did you mean `{PROGRAM} {command} {option} {word}`?"
        )
    raise ValueError(
        f"`{command}` expected a configuration, but got none. Try `{PROGRAM} {command} --config digits/iet_agc`, which "
        f"needs no files (`{PROGRAM} configs` lists more), or `{PROGRAM} {command} --images FOLDER` for your images."
    )


def with_configurations(arguments: Iterable[str]) -> list[str]:
    """Write the paths of configurations in the place of their names.

    Raises:
        FileNotFoundError: If there is neither a file nor a configuration of a name.
        ValueError: If an option of a configuration has none.

    Example:
        >>> with_configurations(["fit", "--config", "digits/iet", "--trainer.max_epochs=1"])
        ['fit', '--config', '...iet.yaml', '--trainer.max_epochs=1']
    """
    found: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if found and found[-1] in ("-c", "--config"):
            found.append(str(find_configuration(argument)))
        elif name in ("-c", "--config") and equals:
            found.append(f"{name}={find_configuration(value)}")
        else:
            found.append(argument)
    if found and found[-1] in ("-c", "--config"):
        raise ValueError(
            f"Option --config expected a file or a name, but got none. `{PROGRAM} configs` lists the names."
        )
    return found


def with_run(arguments: Sequence[str]) -> list[str]:
    """Add the configuration of a run whose checkpoint is tested or validated, where none is given.

    Raises:
        FileNotFoundError: If the checkpoint is a folder that holds none.

    Example:
        >>> with_run(["test", "--ckpt_path", "nowhere.ckpt"])
        ['test', '--ckpt_path', 'nowhere.ckpt']
    """
    names = [argument.partition("=")[0] for argument in arguments]
    if names[:1] not in (["test"], ["validate"]) or "--ckpt_path" not in names or any(map(_is_source, names)):
        return list(arguments)
    position = names.index("--ckpt_path")
    _, equals, value = arguments[position].partition("=")
    text = value if equals else "".join(arguments[position + 1 : position + 2])
    place = checkpoint = Path(text)
    if text and place.is_dir():  # the version whose checkpoint is taken has the configuration too
        checkpoint = find_checkpoint(place) or checkpoint_of(
            place, argument="ckpt_path"
        )  # which says that none is there
    beside = [folder / CONFIG for folder in (place, *list(checkpoint.absolute().parents)[:2])]
    found = next((file for file in beside if file.is_file()), None)
    return [arguments[0], *([] if found is None else ["--config", str(found)]), *arguments[1:]]


def _is_source(name: str) -> bool:
    return name.startswith(_SOURCES)
