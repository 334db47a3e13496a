"""A module from its checkpoint, whatever its class."""

from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_iet.utilities.checkpoints import check_whole, outline
from lightning_iet.utilities.errors import first_line

__all__ = ["load_any_module"]

# Classes are picked from a list of ours: a checkpoint must not name code to run.
_CLASSES = {
    "DiffusionModule": "lightning_iet.modules.diffusion",
    "TextToImageModule": "lightning_iet.modules.text_to_image",
}


def load_any_module(path: Path, *, argument: str = "ckpt") -> Any:
    """Load a module of the class that its checkpoint names, or say in one line why that file is none.

    Args:
        path: A checkpoint.
        argument: The name under which the user gave it.

    Returns:
        The module, on the CPU: it can draw images (``sample``) and be handed on (``pipeline``).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else.
    """
    check_whole(path, argument=argument)
    name = outline(path, argument=argument).get("specification", {}).get("module", "DiffusionModule")
    wanted = f"Argument `{argument}` expected a checkpoint of a {' or '.join(_CLASSES)}, but got '{path}'"
    if name not in _CLASSES:
        raise ValueError(f"{wanted}, which is one of a {name}.")
    try:
        return getattr(import_module(_CLASSES[name]), name).load_from_checkpoint(path, map_location="cpu")
    except (ValueError, ImportError):
        raise
    except Exception as error:  # torch and pickle raise anything on a file of another kind
        raise ValueError(f"{wanted}: {first_line(error)}") from error
