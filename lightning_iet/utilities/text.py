"""Text that people read: lines of names and paths, numbers in words, and terminals that know few characters."""

import codecs
import unicodedata
from math import ceil
from typing import Any


def percent(share: float | None) -> str:
    """Write a share in [0, 1], or None, in per cent: one decimal, or two significant digits below 0.1%.

    Example:
        >>> [percent(share) for share in (0.914, 1, 0.0, 0.0004, 0.0000123, None)]
        ['91.4%', '100.0%', '0.0%', '0.04%', '0.0012%', '–']
    """
    if share is None:
        return "–"
    return f"{100 * share:.2g}%" if 0 < share < 0.001 else f"{share:.1%}"


def three_digits(number: float | None) -> str:
    """Write a number with three significant digits.

    Example:
        >>> [three_digits(number) for number in (1.4, 0.01234, 123.4, None)]
        ['1.40', '0.0123', '123', '–']
    """
    return "–" if number is None else f"{number:#.3g}".rstrip(".")


def counted(number: int, thing: str) -> str:
    """Write a number of things whose plural ends in *s*, in the singular where it is one.

    Example:
        >>> [counted(number, "mask") for number in (1, 2, 15_000)]
        ['1 mask', '2 masks', '15,000 masks']
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def in_words(seconds: float | None) -> str:
    """A time for people.

    Example:
        >>> [in_words(seconds) for seconds in (42, 150, 3 * 3600 + 60, 1e6, None)]
        ['42 s', '3 min', '3 h 1 min', '11 days 13 h', 'no limit']
    """
    if seconds is None:
        return "no limit"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = ceil(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} days {minutes % 1440 // 60} h"


_PLAIN = {
    "\u00a0": " ", "×": "x", "≥": ">=", "≤": "<=", "…": "...", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"',
    "”": '"', "·": "-", "²": "^2", "√": "sqrt", "→": "->", "±": "+-", "ρ": "rho", "α": "alpha", "σ": "sigma",
}  # fmt: skip


def write_plain_text(*streams: Any) -> None:
    """Let streams that cannot encode a character write a plainer one, instead of ending the program.

    A terminal in ASCII, or Windows writing into a file, gets ``x`` for ``×`` and ``>=`` for ``≥``.

    Example:
        >>> from io import BytesIO, TextIOWrapper
        >>> stream = TextIOWrapper(BytesIO(), encoding="ascii")
        >>> write_plain_text(stream)
        >>> _ = stream.write("64×48, naïve, ≥ 2"); stream.flush()
        >>> stream.buffer.getvalue()
        b'64x48, naive, >= 2'
    """
    codecs.register_error("lightning_iet.plain", _plainer)
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="lightning_iet.plain")


def _plainer(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = ""
    for character in error.object[error.start : error.end]:
        decomposed = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        found += _PLAIN.get(character) or decomposed or "?"
    return found, error.end


def say(line: str, *, style: str | None = None) -> None:
    """Print a line whole: brackets in it are no markup, nothing in it is coloured, and only the terminal breaks it.

    Example:
        >>> say("Written to runs/cat [old]: metrics.json")
        Written to runs/cat [old]: metrics.json
    """
    from rich.console import Console  # a tenth of a second, which numbers in words do not need

    Console().print(line, style=style, highlight=False, markup=False, soft_wrap=True)
