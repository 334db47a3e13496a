"""Whether a checkpoint file is whole and harmless, and what it says of itself."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["check_whole", "outline"]


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
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return
        fault = f"of which '{damaged}' is damaged"
    except zipfile.BadZipFile:
        pass
    raise ValueError(
        f"Argument `{argument}` expected a whole checkpoint, but got '{path}', {fault}. Use the one before it."
    )


def outline(path: Path, *, argument: str) -> dict[str, Any]:
    """What a checkpoint holds, with tensors as shapes only: takes milliseconds, whatever the size of the model.

    Nothing that the file asks to be run is run.

    Args:
        path: A file that :func:`check_whole` has passed.
        argument: The name under which the user gave it.

    Raises:
        ValueError: If the file holds anything but tensors and plain values, such as code to run.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
        ...     torch.save({"global_step": 7, "state_dict": {"weight": torch.zeros(2, 3)}}, file.name)
        ...     found = outline(Path(file.name), argument="ckpt_path")
        >>> found["global_step"], found["state_dict"]["weight"].shape, found["state_dict"]["weight"].device
        (7, torch.Size([2, 3]), device(type='meta'))
    """
    try:
        content = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        # torch's own text advises to run such a file's code all the same; only what is wrong is kept of it.
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line), "")
        raise ValueError(
            f"Argument `{argument}` expected a checkpoint of tensors and plain values, but got '{path}', "
            f"which holds something else and is not opened. {reason.strip()}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"Argument `{argument}` expected a checkpoint of Lightning, but got '{path}', "
            f"which holds a {type(content).__name__}."
        )
    return content
