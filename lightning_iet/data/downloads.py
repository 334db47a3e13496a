"""Errors of data that are not there or cannot be downloaded: one line with the remedies."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def absent(title: str, expected: str, root: Path | None) -> FileNotFoundError:
    """Return the error for data that are not there.

    Example:
        >>> print(absent("CIFAR-10", "the folder cifar-10-batches-py", Path("data")))
        Argument `root` expected a folder with CIFAR-10 (the folder cifar-10-batches-py), but got 'data', which has ...
    """
    return FileNotFoundError(
        f"Argument `root` expected a folder with {title} ({expected}), but got '{root}', which has none. Give the "
        "folder that has, fetch the data by `download: true`, or try with random images by `synthetic: true`."
    )


def damaged(title: str, folder: Path) -> ValueError:
    """Return the error for files that are incomplete or changed."""
    return ValueError(
        f"Argument `root` expected the files of {title}, but some in '{folder}' are missing or damaged. Remove the "
        "folder and fetch the data again, by `download: true`."
    )


@contextmanager
def one_line_download(title: str, place: Path | None) -> Iterator[None]:
    """Raise a failed download as one line that says what to do without a network.

    Args:
        title: What is fetched.
        place: Where to; ``None`` = the client's own place.

    Raises:
        ConnectionError: Instead of what the download raises.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        into = "" if place is None else f"put it into '{place}' yourself, or "
        raise ConnectionError(
            f"{title} could not be fetched ({' '.join(str(error).split())[:200]}). Without a network, {into}give the "
            "path of a local copy as `root`."
        ) from error
