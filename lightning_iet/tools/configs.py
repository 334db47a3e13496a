"""The configurations that come with the package: listed, found by name, and copied to edit."""

import re
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path

from lightning_iet.utilities.files import write_atomically

_PACKAGE = Path(__file__).parents[1]


def configs(name: str | None = None, *, out: Path | None = None) -> None:
    """List the configurations that come with the package, or copy one to edit.

    `lightning-iet fit --config NAME` takes a configuration by its name; `lightning-iet configs NAME --out FILE` writes
    a copy of it, and without --out shows it.

    Args:
        name: The configuration to show or to copy; by default all are listed with a line for each.
        out: The file to write.

    Raises:
        FileNotFoundError: If there is no configuration of that name.
        ValueError: If the file is there already, or no name is given.
    """
    if name is None:
        if out is not None:
            raise ValueError(f"Option --out expected the name of a configuration before it, but got '{out}' alone.")
        print(listing())
        return
    file = find_configuration(name, argument="name")
    if out is None:
        print(file.read_text(encoding="utf-8"), end="")
        return
    out = Path(out)
    if out.exists():
        raise ValueError(f"Option --out expected a new file, but got '{out}', which exists. Give another one.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(out) as unfinished:
            unfinished.write_bytes(file.read_bytes())
    except OSError as error:
        raise ValueError(
            f"Option --out expected a file that can be written, but got '{out}' ({error.strerror})."
        ) from error
    command = f"sweep {out}" if "sweeps/" in name else f"fit --config {out}"
    if re.search("^images: null", file.read_text(encoding="utf-8"), re.MULTILINE):
        command += " --images FOLDER"
    print(f"Written to {out}. Edit it, then: lightning-iet {command}")


def listing() -> str:
    """Return the names of all configurations with a line for each, by folder."""
    lines: list[str] = []
    found = configurations()
    width = max(map(len, found))
    for _, names in groupby(found, key=lambda name: name.rpartition("/")[0]):
        lines += [*(f"{name:<{width}}  {summary(found[name])}" for name in names), ""]
    lines.append(
        "lightning-iet fit --config NAME trains with one; lightning-iet configs NAME --out FILE copies it to edit."
    )
    return "\n".join(lines)


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
