"""Optional dependencies: imported where they are used, with a message that says how to get them."""

from importlib import import_module
from types import ModuleType

__all__ = ["require"]


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say which extra of this package brings it.

    Args:
        module: dotted name of the module.
        extra: the extra, as in ``pip install 'lightning-iet[extra]'``.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: if it is not installed, with the line that installs it.

    Example:
        >>> require("math", "inception").sqrt(4.0)
        2.0
        >>> require("no_such_module", "inception")
        Traceback (most recent call last):
            ...
        ModuleNotFoundError: `no_such_module` is not installed. Run: pip install 'lightning-iet[inception]'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        message = f"`{missing}` is not installed. Run: pip install 'lightning-iet[{extra}]'"
        raise ModuleNotFoundError(message, name=missing) from error
