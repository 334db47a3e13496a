"""List the configurations that come with the package, and copy one to edit."""

from itertools import groupby
from pathlib import Path

from lightning_iet.utilities.configurations import configurations, find_configuration, summary
from lightning_iet.utilities.files import write_atomically


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
    command = "sweep" if "sweeps/" in name else "fit --config"
    print(f"Written to {out}. Edit it, then: lightning-iet {command} {out}")


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
