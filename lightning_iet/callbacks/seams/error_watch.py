"""Watching the operations behind a denoiser's output, and only those."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from lightning_iet.callbacks.seams.error_operations import ErrorOperation, error_operation

__all__ = ["ErrorWatch", "owners_behind"]

_DIFFERENCES = ("Sub", "Rsub", "Add", "Lerp", "Compiled")


class ErrorWatch(TorchFunctionMode):
    """Shows the squared and absolute errors that this thread computes to somebody, from :meth:`start` to :meth:`stop`.

    It lies at the bottom of the stack of modes: somebody's ``with torch.device(…)`` may begin before it and end first.

    Args:
        notice: Gets each error that needs a gradient.
        look: Gets the arguments of every operation, if given.

    Example:
        >>> names = []
        >>> watch = ErrorWatch(lambda error: names.append(error.name))
        >>> watch.start()
        >>> loss = (torch.ones(3, requires_grad=True) - 2) ** 2
        >>> watch.stop()
        >>> names
        ['pow']
    """

    def __init__(
        self, notice: Callable[[ErrorOperation], None], look: Callable[[Iterable[Any]], None] | None = None
    ) -> None:
        super().__init__()
        self.notice = notice
        self.look = look

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call, and look at what came out."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.compiler.is_compiling():
            return result
        if self.look is not None:
            self.look((*args, *kwargs.values()))
        error = error_operation(func, args, kwargs, result)
        if error is not None:
            self.notice(error)
        return result

    def start(self) -> None:
        """Begin to watch, unless it does already."""
        self._restack(present=True)

    def stop(self) -> None:
        """Watch no longer."""
        self._restack(present=False)

    def _restack(self, *, present: bool) -> None:
        stack = _get_current_function_mode_stack()  # private, and what torch.device itself uses to lie at the bottom
        if (self in stack) == present:
            return
        others = [mode for mode in stack if mode is not self]
        for _ in stack:
            _pop_mode()
        for mode in [self, *others] if present else others:
            _push_mode(mode)


def owners_behind(tensor: Tensor, owners: Mapping[Node, int], *, after_difference: bool = False) -> set[int]:
    """Which of some nodes of the graph a tensor was computed from; the search goes no further than those.

    Args:
        tensor: Where to start.
        owners: A number for each node.
        after_difference: Count only what a difference was taken of, on the way.

    Returns:
        The numbers of the nodes that were found.
    """
    found: set[int] = set()
    todo = [(tensor.grad_fn, not after_difference)]
    seen = set(todo)
    while todo and len(found) < len(set(owners.values())):
        node, counts = todo.pop()
        if node is None:
            continue
        if node in owners:
            found |= {owners[node]} if counts else set()
            continue
        counts = counts or node.name().startswith(_DIFFERENCES)
        news = {(following, counts) for following, _ in node.next_functions} - seen
        seen |= news
        todo.extend(news)
    return found
