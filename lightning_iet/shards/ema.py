"""Averages of the weights, in a module (submodules, plain tensors, hidden copies) or a callback: one for each shard."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_iet.utilities.lightning import do_nothing, find_callbacks, lightning_classes, patched_attribute

_INTERNAL = frozenset(vars(nn.Module()))
_PLAIN = (type(None), bool, int, float, complex, str, bytes)  # which hold nothing
_OF_LIBRARIES = ("torch.", "lightning.", "pytorch_lightning.", "torchmetrics.", "builtins", "functools", "weakref")


# --- submodules ------------------------------------------------------------------------------------------------------


def averaged_modules(module: nn.Module) -> list[nn.Module]:
    """Return the submodules that hold an average of another one's weights.

    They are every ``AveragedModel``, and every module without trainable parameters whose class, parameters and shapes
    are those of one that is trained: a deep copy. Layers of one network that resemble each other do not count.

    Example:
        >>> module = nn.ModuleDict({"net": nn.Linear(2, 2), "ema": nn.Linear(2, 2).requires_grad_(False)})
        >>> [average is module["ema"] for average in averaged_modules(module)]
        [True]
    """
    averaged: list[nn.Module] = [part for part in module.modules() if isinstance(part, AveragedModel)]
    frozen = [part for part in _frozen_parts(module) if not isinstance(part, AveragedModel)]
    if not frozen:
        return averaged
    trained = _TrainedNetworks(module)
    return averaged + [copy for part in frozen for copy in _deep_copy_in(part, trained)]


def frozen_modules(module: nn.Module) -> list[nn.Module]:
    """Return the largest submodules with parameters none of which is trained (a text encoder), averages excepted."""
    averaged = {id(p) for part in averaged_modules(module) for p in part.parameters()}
    parts = _frozen_parts(module, everywhere=True)
    return [part for part in parts if not any(id(p) in averaged for p in part.parameters())]


def _outline(module: nn.Module) -> tuple[Any, ...]:
    return type(module), *((name, parameter.shape) for name, parameter in module.named_parameters())


class _TrainedNetworks:
    """The networks of which an average may be kept; those of a class are described when one of it is compared."""

    def __init__(self, root: nn.Module) -> None:
        trained = _with_trained(root)
        parts = [(module, part) for module in root.modules() for part in module.children()]
        own = [part for module, part in parts if id(part) in trained and _is_network(part, module, root)]
        self._networks: dict[type, list[nn.Module]] = {}
        for network in (root, *own):
            self._networks.setdefault(type(network), []).append(network)
        self._outlines: dict[type, set[tuple[Any, ...]]] = {}

    def has_like(self, module: nn.Module) -> bool:
        """Whether one has the class, the parameters and the shapes of a module."""
        kind = type(module)
        if kind not in self._networks:
            return False
        if kind not in self._outlines:
            self._outlines[kind] = {_outline(network) for network in self._networks[kind]}
        return _outline(module) in self._outlines[kind]


def _with_trained(root: nn.Module) -> set[int]:
    """Return the ids of all submodules that hold a trained parameter, at any depth, in one walk."""
    found: dict[int, bool] = {}

    def visit(module: nn.Module) -> bool:
        if id(module) not in found:
            within = [visit(part) for part in module.children()]
            own = (parameter for parameter in module._parameters.values() if parameter is not None)
            found[id(module)] = any(within) or any(parameter.requires_grad for parameter in own)
        return found[id(module)]

    visit(root)
    return {name for name, is_trained in found.items() if is_trained}


def _is_network(part: nn.Module, parent: nn.Module, root: nn.Module) -> bool:
    """Whether a submodule may be a network of its own: not a block in a list of them, nor a layer among others."""
    return not isinstance(parent, nn.ModuleList | nn.Sequential) and (parent is root or any(part.children()))


def _frozen_parts(root: nn.Module, *, everywhere: bool = False) -> Iterator[nn.Module]:
    """Yield the largest frozen submodules; unless ``everywhere``, only those that may be a network of their own."""
    yield from _frozen_in(root, root, _with_trained(root), everywhere)


def _frozen_in(module: nn.Module, root: nn.Module, trained: set[int], everywhere: bool) -> Iterator[nn.Module]:
    for part in module.children():
        if id(part) in trained:
            yield from _frozen_in(part, root, trained, everywhere)
        elif next(part.parameters(), None) is not None and (everywhere or _is_network(part, module, root)):
            yield part


def _deep_copy_in(module: nn.Module, trained: _TrainedNetworks) -> Iterator[nn.Module]:
    """Yield the module, or the one inside that holds all of its parameters, if it is a deep copy."""
    if isinstance(module, AveragedModel):
        return
    if trained.has_like(module):
        yield module
        return
    inner = [part for part in module.children() if next(part.parameters(), None) is not None]
    if len(inner) == 1 and not any(True for _ in module.parameters(recurse=False)):
        yield from _deep_copy_in(inner[0], trained)


# --- tensors that are neither parameters nor buffers -----------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """Where a tensor or number is kept that is neither parameter nor buffer: an entry of a container, an attribute."""

    name: str
    owner: Any
    key: Any

    def get(self) -> Any:
        """Return the value."""
        return self.owner[self.key] if isinstance(self.owner, list | dict) else getattr(self.owner, self.key)

    def set(self, value: Any) -> None:
        """Replace the value."""
        if isinstance(self.owner, list | dict):
            self.owner[self.key] = value
        else:
            setattr(self.owner, self.key, value)


def unregistered_averages(module: nn.Module) -> tuple[list[Slot], list[Slot]]:
    """Find averages in plain tensors, as torch-ema's ``shadow_params`` are, and the numbers that are kept with them.

    Averages are: a list of tensors with shapes of trained parameters, a dict of tensors with their names and shapes,
    and a deep copy inside a list or an object of the user's. Numbers (of updates, say) are those of the same object.

    Returns:
        The slots of tensors, and those of numbers.

    Example:
        >>> module = nn.Sequential(nn.Linear(2, 2))
        >>> module.shadow, module.updates = [p.detach().clone() for p in module.parameters()], 0
        >>> tensors, numbers = unregistered_averages(module)
        >>> [slot.name for slot in tensors], [slot.name for slot in numbers]
        (['shadow.0', 'shadow.1'], ['updates'])
    """
    search = _Search(module)
    for path, part in module.named_modules():
        own = {key: value for key, value in vars(part).items() if key not in _INTERNAL and key != "_trainer"}
        search.visit_all(path, part, own, part)
    copied = {id(part) for part in averaged_modules(module) if not isinstance(part, AveragedModel)}
    for path, part in module.named_modules():
        if any(id(child) in copied for child in part.children()):
            search.owners[id(part)] = path, part
    numbers = [
        Slot(f"{path}.{key}".lstrip("."), owner, key)
        for path, owner in search.owners.values()
        for key, value in vars(owner).items()
        if isinstance(value, bool | int | float) and not key.startswith("_") and key not in _INTERNAL
    ]
    return search.tensors, numbers


def averages_beside(module: nn.Module, *things: Any) -> list[Slot]:
    """Find averages of a module's weights in other objects, such as callbacks; see :func:`unregistered_averages`.

    Each object is searched on its own, however one of them is reached from another, so that the limit of depth counts
    from the object itself, and an average has the name of the object that holds it.

    Example:
        >>> class EMA:
        ...     pass
        >>> module, ema = nn.Sequential(nn.Linear(2, 2)), EMA()
        >>> ema.copied = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        >>> [slot.name for slot in averages_beside(module, ema)]
        ['EMA.copied.0.weight', 'EMA.copied.0.bias']
    """
    if not things:
        return []
    search = _Search(module)
    apart = search.seen | {id(thing) for thing in things}
    for thing in things:
        search.seen = set(apart)
        search.visit_all(type(thing).__name__, thing, vars(thing), thing)
    return search.tensors


class _Search:
    """Walks through objects that are attributes of a module without being registered in it."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors: list[Slot] = []
        self.owners: dict[int, tuple[str, Any]] = {}
        self._module = module
        self.seen = {id(part) for part in module.modules()}
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        # Views of registered tensors, such as those of a `state_dict()`, are not averages.
        self._registered = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}
        self._shapes = Counter(p.shape for p in trained.values())
        self._endings = {
            (name[start:], tensor.shape)
            for name, tensor in (*trained.items(), *module.named_buffers())
            for start in (0, *(i + 1 for i, letter in enumerate(name) if letter == "."))
        }

    @cached_property
    def _networks(self) -> _TrainedNetworks:
        return _TrainedNetworks(self._module)

    def visit_all(self, name: str, holder: Any, entries: Mapping[Any, Any], owner: Any, depth: int = 0) -> None:
        """Visit the entries of what holds them under a name; most are numbers and texts, which take no slot."""
        for key, entry in entries.items():
            if type(entry) not in _PLAIN:
                self.visit(Slot(f"{name}.{key}".lstrip("."), holder, key), entry, owner, depth)

    def visit(self, slot: Slot, value: Any, owner: Any, depth: int = 0) -> None:
        """Collect a slot's value if it is an average, else look inside; ``owner`` is the object that it belongs to."""
        if id(value) in self.seen or depth > 4:
            return
        if isinstance(value, list | dict):
            self.seen.add(id(value))
            entries = dict(value.items() if isinstance(value, dict) else enumerate(value))
            if self._are_averages(entries, named=isinstance(value, dict)):
                self._collect([Slot(f"{slot.name}.{key}", value, key) for key in entries], owner, slot)
            elif len(entries) < 1000:
                self.visit_all(slot.name, value, entries, owner, depth + 1)
        elif isinstance(value, nn.Module):
            self.seen.add(id(value))
            if self._networks.has_like(value):
                self._collect(
                    [
                        Slot(".".join(filter(None, (slot.name, path, key))), part, key)
                        for path, part in value.named_modules()
                        for key in (*part._parameters, *part._buffers)
                        if isinstance(getattr(part, key), Tensor)
                    ],
                    owner,
                    slot,
                )
        elif is_users_object(value):
            self.seen.add(id(value))
            self.visit_all(slot.name, value, vars(value), value, depth + 1)

    def _collect(self, slots: list[Slot], owner: Any, slot: Slot) -> None:
        self.tensors += slots
        self.owners[id(owner)] = slot.name.rpartition(".")[0], owner

    def _are_averages(self, entries: Mapping[Any, Any], *, named: bool) -> bool:
        tensors = entries.values()
        if not entries or not all(isinstance(t, Tensor) and t.data_ptr() not in self._registered for t in tensors):
            return False
        if named:
            return all((str(key), tensor.shape) in self._endings for key, tensor in entries.items())
        shapes = Counter(tensor.shape for tensor in tensors)
        return shapes <= self._shapes and all(map(torch.is_floating_point, tensors))


def is_users_object(value: Any) -> bool:
    """Whether something may hold averages: an object of a class that is neither data nor Lightning's nor torch's."""
    if isinstance(value, type | Optimizer | Tensor) or not hasattr(value, "__dict__"):
        return False
    return not hasattr(type(value), "__getitem__") and not type(value).__module__.startswith(_OF_LIBRARIES)


# --- one for each shard ----------------------------------------------------------------------------------------------


class UnregisteredAverages:
    """Keeps the numbers of averages in plain tensors for each shard, and keeps the tensors that were found in place.

    The tensors themselves are among :func:`~lightning_iet.shards.shard_tensors`.

    Args:
        module: About to be trained.
    """

    def __init__(self, module: LightningModule) -> None:
        self._tensors, self._numbers = unregistered_averages(module)
        self._ours = [slot.get() for slot in self._tensors]

    def __bool__(self) -> bool:
        return bool(self._tensors or self._numbers)

    def shard_state(self) -> dict[str, Tensor]:
        """Return the numbers of the active shard; copy tensors that were replaced (``shadow[name] = …``) into ours."""
        for slot, ours in zip(self._tensors, self._ours, strict=True):
            theirs = slot.get()
            if theirs is not ours:
                ours.data.copy_(theirs)
                slot.set(ours)
        numbers = {slot.name: slot.get() for slot in self._numbers}
        return {
            name: torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)
            for name, number in numbers.items()
            if number is not None
        }

    def load_shard_state(self, state: dict[str, Tensor]) -> None:
        """Put another shard's numbers in place."""
        for slot in self._numbers:
            if slot.name in state:
                slot.set(state[slot.name].item())


def weight_averagings(trainer: Trainer | None) -> list[Any]:
    """Return Lightning's own callbacks that keep an average model, such as ``EMAWeightAveraging``."""
    return [] if trainer is None else find_callbacks(trainer, *lightning_classes("callbacks.WeightAveraging"))


class ShardedAverage:
    """Lets a ``WeightAveraging`` callback of Lightning's work for the active shard, and count its steps.

    Its average model is part of the shards' states (see :func:`~lightning_iet.shards.shard_tensors`). Its training
    hooks are called here: while the shard is active, and before shards are averaged.

    Args:
        callback: The callback.
        global_step: Optimizer steps that this process has taken in earlier runs.
    """

    def __init__(self, callback: Any, *, global_step: int) -> None:
        self.callback = callback
        self._hooks = callback.on_train_batch_end, callback.on_train_epoch_end
        self._steps, self._global_steps = 0, global_step

    def step(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        """Call the hook after a batch; the callback sees the shard's own number of optimizer steps."""
        self._steps += trainer.global_step - self._global_steps
        self._global_steps = trainer.global_step
        self._hooks[0](_TrainerAtStep(trainer, self._steps), module, *args)

    def end_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        """Call the hook after the last batch of the active shard in an epoch."""
        self._hooks[1](trainer, module)

    def shard_state(self) -> dict[str, Tensor]:
        """Return the counts of the active shard."""
        callback = self.callback
        return {
            "steps": torch.tensor(self._steps),
            "latest_update_step": torch.tensor(callback._latest_update_step),
            "latest_update_epoch": torch.tensor(callback._latest_update_epoch),
        }

    def load_shard_state(self, state: dict[str, Tensor]) -> None:
        """Put another shard's counts in place."""
        self._steps = int(state["steps"])
        self.callback._latest_update_step = int(state["latest_update_step"])
        self.callback._latest_update_epoch = int(state["latest_update_epoch"])


class _TrainerAtStep:
    """A trainer with another ``global_step``."""

    def __init__(self, trainer: Trainer, global_step: int) -> None:
        self._trainer = trainer
        self.global_step = global_step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


@contextmanager
def sharded_averages(trainer: Trainer, module: LightningModule) -> Iterator[list[ShardedAverage]]:
    """Take over the training hooks of Lightning's ``WeightAveraging`` callbacks inside a block.

    Yields:
        The callbacks, whose hooks Lightning does not call inside the block.
    """
    averages = [ShardedAverage(kept, global_step=trainer.global_step) for kept in weight_averagings(trainer)]
    with ExitStack() as stack:
        for average in averages:
            average.callback._average_model.to(module.device)  # where the weights are, with which it is exchanged
            for hook in ("on_train_batch_end", "on_train_epoch_end"):
                stack.enter_context(patched_attribute(average.callback, hook, do_nothing))
        yield averages
