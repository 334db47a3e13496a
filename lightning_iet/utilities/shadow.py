"""Hiding an attribute of an object for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["shadowed"]

_ABSENT = object()


@contextmanager
def shadowed(thing: object, name: str, replacement: object) -> Iterator[None]:
    """Let an entry of the instance's ``__dict__`` hide an attribute of any origin: class, instance or submodule.

    Example:
        >>> class Thing:
        ...     def name(self):
        ...         return "its own"
        >>> thing = Thing()
        >>> with shadowed(thing, "name", lambda: "another"):
        ...     thing.name()
        'another'
        >>> thing.name(), vars(thing)
        ('its own', {})
    """
    attributes = vars(thing)  # written directly: a plain function may not be assigned over a registered submodule
    before = attributes.get(name, _ABSENT)
    attributes[name] = replacement
    try:
        yield
    finally:
        if before is _ABSENT:
            attributes.pop(name, None)
        else:
            attributes[name] = before
