"""Which values are black and white in images of more than 8 bits: one rule for training, audits and exports."""

import re
from collections.abc import Mapping
from typing import Literal, TypeAlias

Range: TypeAlias = tuple[float, float]
ValueRange: TypeAlias = Range | Literal["auto", "full"]

RANGES: dict[str, Range] = {"integers": (0, 65535), "floating point": (0, 1)}
"""The full ranges."""
DEPTHS = (8, 10, 12, 14, 16)  # bits that integers in files of 16 bits are taken to have


def parse_range(text: str | None) -> ValueRange:
    """Read ``auto``, ``full``, or ``LOW:HIGH``.

    Args:
        text: ``"auto"`` (and ``None``) finds out, see :func:`choose_ranges`; ``"full"`` is 0:65535 for integers, 0:1
            for floating point, and for DICOM what its stored bits can hold, whatever its window.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> parse_range("-1:1"), parse_range(None)
        ((-1.0, 1.0), 'auto')
    """
    if text is None or text == "auto":
        return "auto"
    if text == "full":
        return "full"
    number = r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
    match = re.fullmatch(rf"({number}):({number})", str(text))
    if match is None or not float(match[1]) < float(match[2]):
        raise ValueError(
            f"Argument `range` expected the values of black and white, such as 0:4095 or -1:1, or auto, or full, but "
            f"got '{text}'."
        )
    return float(match[1]), float(match[2])


def format_range(value_range: ValueRange) -> str:
    """Write a range as :func:`parse_range` reads it.

    Example:
        >>> format_range((0, 4095)), format_range("full")
        ('0:4095', 'full')
    """
    return value_range if isinstance(value_range, str) else f"{value_range[0]:.9g}:{value_range[1]:.9g}"


def choose_ranges(values: Mapping[str, Range]) -> dict[str, Range]:
    """Find out what is black and white in files of 16 bits, which often hold fewer.

    Scanners write 10 or 12 bits into files of 16 *(our choice: the least of 8, 10, 12, 14 and 16 bits that holds every
    value of the set)*. Sets whose largest values differ by less than a factor of 4 are taken to be of one kind, and
    share a range: so a set whose brightest image happens to be dark is not brightened.

    Args:
        values: By set the least and the largest value, from 0 to 65535.

    Returns:
        By set the values of black and white.

    Example:
        >>> choose_ranges({"train": (0, 4095), "held_out": (0, 1500), "generated": (0, 65535)})
        {'train': (0, 4095), 'held_out': (0, 4095), 'generated': (0, 65535)}
    """
    ranges: dict[str, Range] = {}
    for name, (_, high) in values.items():
        shared = max(other for _, other in values.values() if other < 4 * max(high, 1))
        ranges[name] = 0, next(2**bits - 1 for bits in DEPTHS if shared < 2**bits)
    return ranges
