"""Hooks before and after the calls of modules, on none of which a compiler stumbles."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from lightning_iet.utilities.shadow import shadowed

__all__ = ["Listener", "hooked", "modules_to_hook"]


class Listener(Protocol):
    """Who hears of calls."""

    def before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module is about to be called."""

    def after_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """A module has returned."""


def modules_to_hook(root: nn.Module, name: str | None = None) -> dict[nn.Module, str]:
    """All modules by name but those inside a compiled one, where a hook would be compiled too.

    Args:
        root: Where to look.
        name: Of the only one that is wanted; None for all.

    Raises:
        ValueError: If none has that name.
    """
    if name is not None:
        try:
            return {root.get_submodule(name): name}
        except AttributeError:
            children = [child for child, _ in root.named_children()]
            raise ValueError(
                f"Argument `denoiser` expected the name of a module in {type(root).__name__}, such as one of"
                f" {children}, but got {name!r}."
            ) from None
    found: dict[nn.Module, str] = {}
    inside: set[nn.Module] = set()

    def visit(module: nn.Module, name: str) -> None:
        found.setdefault(module, name)
        if _is_compiled(module):
            inside.update(part for part in module.modules() if part is not module)
            return
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name)

    visit(root, "")
    return {module: name for module, name in found.items() if module not in inside}


def _is_compiled(module: nn.Module) -> bool:
    in_place = module._compiled_call_impl is not None
    return in_place or hasattr(module, "_orig_mod") or isinstance(module, torch.jit.ScriptModule)


@contextmanager
def hooked(module: nn.Module, listener: Listener) -> Iterator[None]:
    """Tell a listener of every call of a module."""
    compiled = module._compiled_call_impl
    with ExitStack() as stack:
        if compiled is None:
            before, after = _Hook(listener.before_call), _Hook(listener.after_call)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        else:
            # Compiled in place, its hooks are compiled as well: this stands in front of all that.
            def call(*args: Any, **kwargs: Any) -> Any:
                listener.before_call(module, args, kwargs)
                output = compiled(*args, **kwargs)
                listener.after_call(module, args, kwargs, output)
                return output

            stack.enter_context(shadowed(module, "_compiled_call_impl", call))
        yield


class _Hook:
    """A hook that hears nothing in a copy of its module, pickled or not."""

    def __init__(self, hear: Callable[..., None]) -> None:
        self.hear = hear

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.hear(*args)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _deaf_hook, ()


def _deaf_hook() -> Callable[..., None]:
    return _hear_nothing


def _hear_nothing(*args: Any) -> None:
    """What is left of a hook in a copy."""
