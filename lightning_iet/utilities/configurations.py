"""The configurations that come with the package: listed, and found by name."""

from difflib import get_close_matches
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def configurations() -> dict[str, Path]:
    """Return the file of each configuration by its name, such as ``digits/iet_agc``.

    Example:
        >>> configurations()["digits/iet_agc"].name
        'iet_agc.yaml'
    """
    installed = _PACKAGE / "configs"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "configs"  # of a clone
    files = sorted(folder.rglob("*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def summary(file: Path) -> str:
    """Return the first line of the comment at the top of a configuration.

    Example:
        >>> summary(configurations()["digits/iet_agc"])
        'IET-AGC, both methods together (ECCV 2024, arXiv 2407.15328), on 56 digits.'
    """
    return file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def shipped_configuration(name: Path | str) -> Path | None:
    """Return the file of a configuration by its name, or by its path in the repository; ``None`` = there is none.

    Example:
        >>> shipped_configuration("configs/digits/iet.yaml") == shipped_configuration("digits/iet") is not None
        True
    """
    return configurations().get(_plain(name))


def find_configuration(name: Path | str, *, argument: str = "config") -> Path:
    """Return the file of a configuration: a file of that path, or one that comes with the package.

    Args:
        name: Path or name.
        argument: The name under which the user gave it.

    Raises:
        FileNotFoundError: If there is neither.

    Example:
        >>> find_configuration("digits/ie_agc")
        Traceback (most recent call last):
        ...
        FileNotFoundError: Option --config expected a file or the name of a configuration that comes with the package,
        but got 'digits/ie_agc'. Did you mean digits/iet_agc? `lightning-iet configs` lists all names.
    """
    if Path(name).is_file():
        return Path(name)
    found = shipped_configuration(name)
    if found is None:
        known, plain = configurations(), _plain(name)
        close = [one for one in known if one.endswith(f"/{plain}")] or get_close_matches(plain, known, n=1)
        raise FileNotFoundError(
            f"Option --{argument} expected a file or the name of a configuration that comes with the package, but got "
            f"'{name}'. {f'Did you mean {close[0]}? ' if close else ''}`lightning-iet configs` lists all names."
        )
    return found


def _plain(name: Path | str) -> str:
    return Path(name).as_posix().removeprefix("configs/").removesuffix(".yaml")
