"""What a configuration of Lightning says, for whoever reads it beside Lightning's own command line."""

from collections.abc import Mapping, MutableMapping
from types import ModuleType
from typing import Any


def import_exports(*packages: ModuleType) -> None:
    """Import all that packages export: a configuration may name a class without its module, once it is imported."""
    for package in packages:
        for name in package.__all__:
            getattr(package, name)


def instantiate(parser: Any, parsed: Any) -> Any:
    """Make the objects that settings describe, with the parser of jsonargparse that has read them."""
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name since jsonargparse 4.49
    return make(parsed)


def named_devices(devices: Any) -> int:
    """Return how many devices ``trainer.devices`` names for certain; what is none, Lightning will refuse.

    Example:
        >>> [named_devices(devices) for devices in ("auto", -1, None, 2, "2", [0, 1], [1], "0,1", "1,")]
        [1, 1, 1, 2, 2, 2, 1, 2, 1]
    """
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list | tuple):
        return len(devices)
    number = str(devices)
    return max(1, int(number)) if number.isdecimal() else 1


def leave_weights_out(model: MutableMapping[str, Any], data: Mapping[str, Any]) -> None:
    """Let a model be one without its weights, if it can be, where its data are synthetic.

    Args:
        model: ``init_args`` of the model.
        data: ``init_args`` of the data.
    """
    if data.get("synthetic") and "synthetic" in model:
        model["synthetic"] = True
