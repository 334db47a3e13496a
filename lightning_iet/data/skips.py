"""Samples that cannot be used: what they are called, and why."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from lightning_iet.utilities.naming import printable

__all__ = ["Skip", "listed", "name_of", "reason_of"]

SHOWN = 5  # names in a message


class Skip(NamedTuple):
    """A sample that cannot be used."""

    name: str
    reason: str


def reason_of(error: Exception) -> str:
    """Why an image could not be read, in one line.

    Example:
        >>> reason_of(ValueError("cut  off")), reason_of(KeyError())
        ('cut off', 'KeyError')
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "UnidentifiedImageError":  # its message names an object in memory
        return "not an image that Pillow knows"
    return printable(" ".join(str(error).split())) or type(error).__name__


def name_of(source: Dataset[Any], index: int) -> str:
    """What to call a sample: by the source's ``name(index)`` if it has that, else by its position."""
    return printable(source.name(index)) if hasattr(source, "name") else str(index)


def listed(skipped: Sequence[Skip]) -> str:
    """The first few of what cannot be used, for a message.

    Example:
        >>> listed([Skip("a.png", "the file is empty")] * 6)
        "'a.png' (the file is empty), ..., and 1 more"
    """
    shown = [f"'{name}' ({reason})" for name, reason in skipped[:SHOWN]]
    return ", ".join(shown) + (f", and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else "")
