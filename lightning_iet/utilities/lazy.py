"""Import what a package exports when it is first used (PEP 562)."""

import ast
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazy_exports(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` that make the imports under a package's ``if TYPE_CHECKING:`` on demand.

    Type checkers and completion read these imports as they stand; at run time each is made on the first access to its
    name. Submodules are found likewise, so that ``lightning_iet.metrics`` works after ``import lightning_iet``.

    Example:
        >>> import lightning_iet
        >>> "DiffusionModule" in dir(lightning_iet)
        True
        >>> lightning_iet.Diffusion
        Traceback (most recent call last):
        ...
        AttributeError: module 'lightning_iet' has no attribute 'Diffusion'
    """

    @cache
    def homes() -> dict[str, str]:
        """The module of each exported name."""
        source = sys.modules[package].__spec__.loader.get_source(package)  # type: ignore[union-attr]
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
        ours = [node for node in imports if str(node.module).startswith("lightning_iet.")]
        return {alias.name: str(node.module) for node in ours for alias in node.names}

    def attribute(name: str) -> Any:
        if not name.startswith("_"):
            if name in homes():
                value = getattr(import_module(homes()[name]), name)
                setattr(sys.modules[package], name, value)  # the next access does not come here
                return value
            if find_spec(f"{package}.{name}") is not None:
                return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return attribute, lambda: sorted({*vars(sys.modules[package]), *homes()})
