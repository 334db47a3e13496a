"""Averages of the weights that a module keeps beside them, in whatever form."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

_INTERNAL = frozenset(vars(nn.Module()))
_OF_LIBRARIES = ("torch.", "lightning.", "pytorch_lightning.", "torchmetrics.", "builtins", "functools", "weakref")


@dataclass(frozen=True)
class Beside:
    """A tensor, or a number, that is neither parameter nor buffer: an entry of a list or dict, or an attribute."""

    name: str
    owner: Any
    key: Any

    def get(self) -> Any:
        """What is there now."""
        return self.owner[self.key] if isinstance(self.owner, list | dict) else getattr(self.owner, self.key)

    def set(self, value: Any) -> None:
        """Put something in its place."""
        if isinstance(self.owner, list | dict):
            self.owner[self.key] = value
        else:
            setattr(self.owner, self.key, value)


# --- modules ---------------------------------------------------------------------------------------------------------


def copied_modules(module: nn.Module) -> list[nn.Module]:
    """Submodules that hold an average of another one's weights.

    They are every ``AveragedModel``, and every module without trainable parameters whose class, parameters and shapes
    are those of one that is trained: a deep copy. Layers of one network that resemble each other are none.

    Example:
        >>> module = nn.ModuleDict({"net": nn.Linear(2, 2), "ema": nn.Linear(2, 2).requires_grad_(False)})
        >>> [copy is module["ema"] for copy in copied_modules(module)]
        [True]
    """
    trained = _trained_outlines(module)
    averaged = [part for part in module.modules() if isinstance(part, AveragedModel)]
    return averaged + [part for part in _frozen_parts(module, module) for part in _copy_in(part, trained)]


def frozen_modules(module: nn.Module) -> list[nn.Module]:
    """The largest submodules with parameters none of which is trained, such as a text encoder, but for copies."""
    copied = {id(p) for part in copied_modules(module) for p in part.parameters()}
    parts = _frozen_parts(module, module, everywhere=True)
    return [part for part in parts if not any(id(p) in copied for p in part.parameters())]


def _outline(module: nn.Module) -> tuple[Any, ...]:
    return type(module), *((name, parameter.shape) for name, parameter in module.named_parameters())


def _trained_outlines(root: nn.Module) -> set[tuple[Any, ...]]:
    """Of the networks of which an average may be kept."""
    parts = [(module, part) for module in root.modules() for part in module.children()]
    own = [part for module, part in parts if _is_trained(part) and _is_own(part, module, root)]
    return {_outline(part) for part in (root, *own)}


def _is_own(part: nn.Module, parent: nn.Module, root: nn.Module) -> bool:
    """Whether a submodule may be a network of its own: no block in a row of them, and no layer among others."""
    return not isinstance(parent, nn.ModuleList | nn.Sequential) and (parent is root or any(part.children()))


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _frozen_parts(module: nn.Module, root: nn.Module, *, everywhere: bool = False) -> Iterator[nn.Module]:
    """The largest frozen submodules; unless ``everywhere``, only such as may be a network of their own."""
    for part in module.children():
        if _is_trained(part):
            yield from _frozen_parts(part, root, everywhere=everywhere)
        elif next(part.parameters(), None) is not None and (everywhere or _is_own(part, module, root)):
            yield part


def _copy_in(module: nn.Module, trained: set[tuple[Any, ...]]) -> Iterator[nn.Module]:
    """The module, or the one inside that holds all of its parameters, if it is a deep copy."""
    if isinstance(module, AveragedModel):
        return
    if _outline(module) in trained:
        yield module
        return
    inner = [part for part in module.children() if next(part.parameters(), None) is not None]
    if len(inner) == 1 and not any(True for _ in module.parameters(recurse=False)):
        yield from _copy_in(inner[0], trained)


# --- tensors ---------------------------------------------------------------------------------------------------------


def tensors_beside(module: nn.Module) -> tuple[list[Beside], list[Beside]]:
    """Averages in plain tensors, as torch-ema's ``shadow_params`` are, and the numbers that are kept with them.

    A list of tensors with shapes of trained parameters, a dict of tensors with their names and shapes, and a deep copy
    that a list or an object of the user's hides. Numbers (of updates, say) are those of the same object.

    Example:
        >>> module = nn.Sequential(nn.Linear(2, 2))
        >>> module.shadow, module.updates = [p.detach().clone() for p in module.parameters()], 0
        >>> tensors, numbers = tensors_beside(module)
        >>> [place.name for place in tensors], [place.name for place in numbers]
        (['shadow.0', 'shadow.1'], ['updates'])
    """
    search = _Search(module)
    for path, part in module.named_modules():
        for key, value in vars(part).items():
            if key not in _INTERNAL and key != "_trainer":
                search.look(Beside(f"{path}.{key}".lstrip("."), part, key), value, part)
    copies = [part for part in copied_modules(module) if not isinstance(part, AveragedModel)]
    for path, part in module.named_modules():
        if any(child in copies for child in part.children()):
            search.owners[id(part)] = path, part
    numbers = [
        Beside(f"{path}.{key}".lstrip("."), owner, key)
        for path, owner in search.owners.values()
        for key, value in vars(owner).items()
        if isinstance(value, bool | int | float) and not key.startswith("_") and key not in _INTERNAL
    ]
    return search.tensors, numbers


class _Search:
    """A walk through what hangs on a module without being registered in it."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors: list[Beside] = []
        self.owners: dict[int, tuple[str, Any]] = {}
        self._outlines = _trained_outlines(module)
        self._seen = {id(part) for part in module.modules()}
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        # Views of registered tensors, such as those of a `state_dict()`, are no copies.
        self._registered = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}
        self._shapes = Counter(p.shape for p in trained.values())
        self._endings = {
            (name[start:], tensor.shape)
            for name, tensor in (*trained.items(), *module.named_buffers())
            for start in (0, *(i + 1 for i, letter in enumerate(name) if letter == "."))
        }

    def look(self, place: Beside, value: Any, owner: Any, depth: int = 0) -> None:
        """Take in what is at a place if it is an average; ``owner`` is the object that it belongs to."""
        if id(value) in self._seen or depth > 4:
            return
        if isinstance(value, list | dict):
            self._seen.add(id(value))
            entries = dict(value.items() if isinstance(value, dict) else enumerate(value))
            if self._are_averages(entries, named=isinstance(value, dict)):
                self._take({key: Beside(f"{place.name}.{key}", value, key) for key in entries}, owner, place)
            elif len(entries) < 1000:
                for key, entry in entries.items():
                    self.look(Beside(f"{place.name}.{key}", value, key), entry, owner, depth + 1)
        elif isinstance(value, nn.Module):
            self._seen.add(id(value))
            if _outline(value) in self._outlines:
                self._take_module(value, owner, place)
        elif _is_of_a_user(value):
            self._seen.add(id(value))
            for key, entry in vars(value).items():
                self.look(Beside(f"{place.name}.{key}", value, key), entry, value, depth + 1)

    def _take(self, places: Mapping[Any, Beside], owner: Any, place: Beside) -> None:
        self.tensors += places.values()
        self.owners[id(owner)] = place.name.rpartition(".")[0], owner

    def _take_module(self, module: nn.Module, owner: Any, place: Beside) -> None:
        places = {}
        for path, part in module.named_modules():
            for key in (*part._parameters, *part._buffers):
                if isinstance(getattr(part, key), Tensor):
                    places[path, key] = Beside(".".join(filter(None, (place.name, path, key))), part, key)
        self._take(places, owner, place)

    def _are_averages(self, entries: Mapping[Any, Any], *, named: bool) -> bool:
        tensors = entries.values()
        if not entries or not all(isinstance(t, Tensor) and t.data_ptr() not in self._registered for t in tensors):
            return False
        if named:
            return all((str(key), tensor.shape) in self._endings for key, tensor in entries.items())
        return Counter(tensor.shape for tensor in tensors) <= self._shapes and all(
            map(torch.is_floating_point, tensors)
        )


def _is_of_a_user(value: Any) -> bool:
    """Whether something may hold averages: an object of a class that is neither data nor Lightning's nor torch's."""
    if isinstance(value, type | Optimizer | Tensor) or not hasattr(value, "__dict__"):
        return False
    return not hasattr(type(value), "__getitem__") and not type(value).__module__.startswith(_OF_LIBRARIES)
