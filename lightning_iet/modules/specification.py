"""How a denoiser is written into a checkpoint, and built again from it."""

from importlib import import_module
from typing import Any

import torch

__all__ = ["rebuild_arguments", "specify"]


def specify(thing: object) -> dict[str, Any] | None:
    """Class and configuration of a diffusers model or scheduler; None for a class that keeps no ``config``.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> specify(DDPMScheduler())["class_path"]
        'diffusers.DDPMScheduler'
    """
    config = getattr(thing, "config", None)
    if config is None or not hasattr(type(thing), "from_config"):
        return None
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in dict(config).items()}
    return {"class_path": f"diffusers.{type(thing).__name__}", "config": plain}


def _build(specification: dict[str, Any]) -> Any:
    module, _, name = specification["class_path"].rpartition(".")
    # Only diffusers' own classes are built: a checkpoint must not name any callable of this machine.
    if module != "diffusers":
        raise ValueError(f"Checkpoint expected a class of diffusers, but got {specification['class_path']!r}.")
    return getattr(import_module(module), name).from_config(specification["config"])


def rebuild_arguments(path: Any, *, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a module's constructor, from its checkpoint; what is given wins.

    Args:
        path: The checkpoint.
        given: Arguments that the caller has set.

    Raises:
        ValueError: If the checkpoint does not say how to build the denoiser and none was given.
    """
    specification = torch.load(path, map_location="cpu", weights_only=True).get("specification", {})
    arguments = {name: value for name, value in specification.items() if name not in given and value is not None}
    for name in ("unet", "scheduler"):
        if name in arguments:
            arguments[name] = _build(arguments[name])
    if "unet" not in arguments | given:
        raise ValueError(
            f"Argument `unet` expected the denoiser of {path}, which does not say how to build it, but got none. "
            "Use load_from_checkpoint(path, unet=YourDenoiser(…))."
        )
    return arguments | given
