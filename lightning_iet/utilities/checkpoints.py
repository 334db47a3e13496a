"""Whether a checkpoint file is whole."""

import zipfile
from pathlib import Path

__all__ = ["check_whole"]


def check_whole(path: Path, *, argument: str) -> None:
    """Refuse a file that is missing, cut off, damaged, or no checkpoint at all.

    torch writes checkpoints as zip archives; a torn one has lost its table of contents, a damaged one fails a checksum.

    Args:
        path: The file.
        argument: The name under which the user gave it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read as a whole.

    Example:
        >>> check_whole(Path(__file__), argument="ckpt_path")
        Traceback (most recent call last):
        ...
        ValueError: Argument `ckpt_path` expected a whole checkpoint, but got '...', which is cut off or no ...
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"Argument `{argument}` expected a checkpoint file, but got '{path}', which does not exist."
        )
    fault = "which is cut off or no checkpoint"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return
        fault = f"of which '{damaged}' is damaged"
    raise ValueError(
        f"Argument `{argument}` expected a whole checkpoint, but got '{path}', {fault}. Use the one before it."
    )
