"""How a denoiser is written into a checkpoint, and built again from it."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_same_architecture", "rebuild_arguments", "specify"]


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
    arguments.pop("module", None)  # the class, which the caller knows
    for name in ("unet", "scheduler"):
        if name in arguments:
            arguments[name] = _build(arguments[name])
    if "unet" not in arguments | given:
        raise ValueError(
            f"Argument `unet` expected the denoiser of {path}, which does not say how to build it, but got none. "
            "Use load_from_checkpoint(path, unet=YourDenoiser(…))."
        )
    return arguments | given


def check_same_architecture(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse weights of another architecture, before torch lists each of them.

    Args:
        saved: Weights of the checkpoint, by name.
        own: Weights of the module that is to take them.

    Raises:
        ValueError: Naming the first difference.

    Example:
        >>> check_same_architecture({"weight": torch.zeros(2)}, {"weight": torch.zeros(3)})
        Traceback (most recent call last):
        ...
        ValueError: The checkpoint expected `weight` of shape (2,), but the module has it of shape (3,) (1 weight ...
    """
    shapes = [{name: tuple(tensor.shape) for name, tensor in weights.items()} for weights in (saved, own)]
    names = list(dict.fromkeys([*own, *saved]))
    others = [name for name in names if shapes[0].get(name) != shapes[1].get(name)]
    if not others:
        return
    there, here = (f"of shape {found[others[0]]}" if others[0] in found else "not at all" for found in shapes)
    raise ValueError(
        f"The checkpoint expected `{others[0]}` {there}, but the module has it {here} ({len(others)} "
        f"weight{'s' * (len(others) > 1)} of {len(names)} differ{'s' * (len(others) == 1)}): it is of another "
        "architecture. Give the model the settings that the checkpoint was trained with."
    )
