"""What shards would share without anybody noticing: averages, and other tensors, that are made after training began."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_iet.shards.ema import Slot, averages_beside, is_users_object, unregistered_averages
from lightning_iet.shards.layout import checksums
from lightning_iet.shards.state import ShardwiseCallback
from lightning_iet.utilities.lightning import Callback
from lightning_iet.utilities.modules import distinct_modules

_SKIPPED = frozenset(vars(nn.Module())) | {"_trainer", "_fabric", "_log_hyperparams", "_hparams", "_metric_attributes"}
_WRITES = ("__setitem__", "copy_", "zero_", "fill_")


class LateWatch:
    """Refuses state of the module or of callbacks that one shard would take over from another.

    Averages of weights are known by their shapes. Anything else is judged by the first two steps: a tensor that the
    first step made or changed, that the second one read, and that it changed again, is carried from step to step.
    Tables that are made once, and lists of losses for the log, are not; nor are metrics of torchmetrics.

    Args:
        trainer: About to train; its callbacks are looked at, but those of Lightning and those that keep a state by
            shard.
        module: What it trains.
        kept: The tensors that each shard has its own of.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, kept: Iterable[Tensor]) -> None:
        self._trainer, self._module = trainer, module
        self._known = _averages(module)
        self._kept = [*kept, *self._known.values()]
        self._found_before = {*self._known, *(name for name, _ in module.named_buffers())}
        self._before = self._held()
        self._suspects: dict[str, tuple[Tensor, int]] = {}
        self._reading: _Reading | None = None
        self._stack = ExitStack()
        self._slots: list[Slot] = []
        self._checksums: dict[str, int] = {}
        self._outline: tuple[Any, ...] = ()

    def check(self, steps: int) -> None:
        """Look at what is there after some steps of this process; before the first step too.

        Raises:
            MisconfigurationException: If shards would share something.
        """
        callbacks = [
            callback
            for callback in self._trainer.callbacks  # type: ignore[attr-defined]
            if is_users_object(callback) and not isinstance(callback, ShardwiseCallback | Callback)
        ]
        outline = tuple(_outline(thing) for thing in (*self._module.modules(), *callbacks))
        if outline != self._outline:  # a search takes longer than a short turn of a shard
            self._outline = outline
            self._check_averages()
            self._slots = [slot for callback in callbacks for slot in averages_beside(self._module, callback)]
        self._check_callbacks()
        if steps == 1:
            self._suspects = {
                name: seen for name, seen in self._held().items() if not _same(seen, self._before.get(name))
            }
            self._before = {}
        elif steps == 2 and self._reading is not None:
            held, read = self._held(), self._reading.read
            for name, (tensor, version) in self._suspects.items():
                if id(tensor) in read and not _same((tensor, version), held.get(name)):
                    _refuse(f"keeps '{name}', a tensor that is carried from step to step, outside of buffers")
            self._suspects, self._reading = {}, None

    def begin_step(self, steps: int) -> None:
        """In the second step, look at what is read."""
        if steps == 1 and self._suspects:
            self._reading = _Reading({id(tensor) for tensor, _ in self._suspects.values()})
            self._stack.enter_context(self._reading)

    def end_step(self) -> None:
        """Look no longer."""
        self._stack.close()

    def _held(self) -> dict[str, tuple[Tensor, int]]:
        """Tensors of which nobody keeps one for each shard, with the number of changes in place."""
        own = {id(tensor) for tensor in self._kept}
        return {
            name: (tensor, tensor._version)
            for name, tensor in held_tensors(self._module).items()
            if id(tensor) not in own and name not in self._found_before
        }

    def _check_averages(self) -> None:
        known = {id(tensor) for tensor in self._known.values()}
        averages = _averages(self._module)
        if late := [name for name, t in averages.items() if name not in self._known and id(t) not in known]:
            _refuse(f"made '{late[0]}', which looks like an average of the weights, after training began")

    def _check_callbacks(self) -> None:
        """Refuse averages of a callback that change: it does not know of shards."""
        if not self._slots:
            return
        known, found = self._checksums, {}
        for slot in self._slots:
            with suppress(LookupError, AttributeError):  # a list may have become shorter
                found[slot.name] = slot.get()
        self._checksums = dict(zip(found, checksums(found.values()).tolist(), strict=True))
        for name, value in self._checksums.items():
            if name in known and known[name] != value:
                callback, _, attribute = name.partition(".")
                raise MisconfigurationException(
                    f"ParameterAveragingCallback expected each shard to have its own averages of the weights, but got "
                    f"the callback {callback}, whose '{attribute}' changes and would be shared. Use Lightning's "
                    "EMAWeightAveraging, or give it the methods of lightning_iet.shards.ShardwiseCallback, shard_state "
                    "and load_shard_state."
                )


def _outline(thing: Any, depth: int = 2) -> tuple[Any, ...]:
    """The kinds of all attributes, and which containers are empty: where an average is made, this changes."""
    values = vars(thing)
    kinds = [
        _outline(value, depth - 1)
        if depth and is_users_object(value) and not isinstance(value, nn.Module)
        else (type(value), bool(value) if isinstance(value, list | tuple | Mapping) else None)
        for value in values.values()
    ]
    return *kinds, len(values.get("_parameters", ())), len(values.get("_modules", ()))


def _averages(module: LightningModule) -> dict[str, Tensor]:
    """The parameters of a module, and averages that are none, by name."""
    return {**dict(module.named_parameters()), **{slot.name: slot.get() for slot in unregistered_averages(module)[0]}}


def held_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a module holds besides parameters: buffers, attributes, those in containers and objects.

    Example:
        >>> module = nn.Linear(1, 1)
        >>> module.seen = {"last": [torch.zeros(2)]}
        >>> list(held_tensors(module))
        ['seen.last.0']
    """
    seen: set[int] = set()

    def visit(name: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield name, value
            return
        is_container = isinstance(value, Mapping | list | tuple | set) or type(value).__name__ == "deque"
        if depth == 0 or id(value) in seen or not (is_container or is_users_object(value)):
            return
        seen.add(id(value))
        if isinstance(value, Mapping):
            entries = list(value.items())
        elif is_container:
            entries = list(enumerate(value))
        else:
            entries = list(vars(value).items())
        for key, entry in entries[:1000]:
            yield from visit(f"{name}.{key}", entry, depth - 1)

    found: dict[str, Tensor] = {}
    for path, part in distinct_modules(module):
        if type(part).__module__.startswith("torchmetrics."):
            continue
        seen.add(id(part))
        values = {key: value for key, value in vars(part).items() if key not in _SKIPPED} | part._buffers
        for key, value in values.items():
            found.update(visit(f"{path}.{key}".lstrip("."), value, 4))
    return found


class _Reading(TorchFunctionMode):
    """Notes which of some tensors operations read."""

    def __init__(self, watched: set[int]) -> None:
        super().__init__()
        self.watched = watched
        self.read: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():
            skipped = 1 if getattr(func, "__name__", "") in _WRITES else 0
            self._note([*args[skipped:], *kwargs.values()])
        return func(*args, **kwargs)

    def _note(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, list | tuple):
                self._note(value)
            elif id(value) in self.watched:
                self.read.add(id(value))


def _same(seen: tuple[Tensor, int], other: tuple[Tensor, int] | None) -> bool:
    return other is not None and seen[0] is other[0] and seen[1] == other[1]


def _refuse(what: str) -> None:
    raise MisconfigurationException(
        f"ParameterAveragingCallback expected to find what each shard has its own of when training starts, but the "
        f"module {what}: the next shard would go on with it. Make it in __init__, setup or on_fit_start: averages of "
        "the weights as a list or dict of copies, a deep copy, or an AveragedModel; anything else as a buffer "
        "(register_buffer) of a module that is trained."
    )
