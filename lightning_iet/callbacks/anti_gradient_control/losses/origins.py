"""Which calls of a denoiser a tensor goes back to: through gradients, or past them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

_ASSIGNMENTS = ("__setitem__",)


class _Marks(NamedTuple):
    """Numbers of calls."""

    passing: frozenset[int] = frozenset()  # whose outputs a gradient reaches
    fixed: frozenset[int] = frozenset()  # whose outputs are in the values, but no gradient reaches


class Origins:
    """Follows the outputs of a denoiser through the operations of one step, scaled, clamped or mixed as they may be.

    Example:
        >>> import torch
        >>> student, teacher, origins = nn.Linear(1, 1), nn.Linear(1, 1), Origins()
        >>> made, target = torch.ones(1, requires_grad=True), torch.zeros(1)
        >>> origins.add(student, [made])
        >>> origins.add(teacher, [target])
        >>> error = made - target
        >>> origins.follow(torch.Tensor.sub, (made, target), {}, error)
        >>> [module is teacher for module in origins.foreign(error)]
        [True]
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._marks: dict[int, tuple[Tensor, _Marks]] = {}  # by id of the tensor, which lives as long

    def __bool__(self) -> bool:
        return bool(self._modules)

    def add(self, module: nn.Module, outputs: Iterable[Tensor]) -> None:
        """A call has returned these outputs: whatever was followed inside it does not matter any more."""
        outputs = list(outputs)
        if not outputs:
            return
        number = frozenset([len(self._modules)])
        self._modules.append(module)
        for tensor in outputs:
            self._marks[id(tensor)] = tensor, _Marks(passing=number) if tensor.requires_grad else _Marks(fixed=number)

    def follow(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Mark what an operation made of what is marked."""
        marks = [self._marks[id(t)][1] for t in _tensors((args, kwargs)) if id(t) in self._marks]
        if not marks:
            return
        passing = frozenset().union(*(mark.passing for mark in marks))
        fixed = frozenset().union(*(mark.fixed for mark in marks))
        name = getattr(func, "__name__", "")
        in_place = name in _ASSIGNMENTS or (name.endswith("_") and not name.endswith("__"))
        for tensor in _tensors(args[:1] if in_place else result):
            made = _Marks(passing, fixed) if tensor.requires_grad else _Marks(fixed=passing | fixed)
            self._marks[id(tensor)] = tensor, made

    def foreign(self, tensor: Tensor) -> list[nn.Module]:
        """The modules whose outputs are in a tensor without a gradient, those excepted that a gradient reaches too."""
        marks = self._marks[id(tensor)][1] if id(tensor) in self._marks else _Marks()
        return [self._modules[number] for number in sorted(marks.fixed - marks.passing)]

    def clear(self) -> None:
        """Forget all."""
        self._modules, self._marks = [], {}


def _tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry, depth - 1)
    elif depth and isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry, depth - 1)
