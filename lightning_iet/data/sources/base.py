"""What every source of stored images offers."""

from typing import Any, Protocol, TypeAlias

from numpy.typing import NDArray

__all__ = ["Data", "Source"]

Data: TypeAlias = bytes | NDArray[Any]
"""What a source holds of an image: a file's bytes, or an array."""


class Source(Protocol):
    """Images that can be read one at a time, by several processes, in an order that does not change."""

    def __len__(self) -> int:
        """Number of images, readable or not."""

    def name(self, index: int) -> str:
        """What to call an image."""

    def read(self, index: int) -> Data:
        """One image as it is stored: the bytes of a file, or an array."""
