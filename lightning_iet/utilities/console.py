"""Lines on the terminal that hold names and paths as they are."""

from rich.console import Console


def say(line: str, *, style: str | None = None) -> None:
    """Print a line whole: brackets in it are no markup, nothing in it is coloured, and only the terminal breaks it.

    Example:
        >>> say("Written to runs/cat [old]: metrics.json")
        Written to runs/cat [old]: metrics.json
    """
    Console().print(line, style=style, highlight=False, markup=False, soft_wrap=True)
