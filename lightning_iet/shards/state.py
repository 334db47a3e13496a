"""Whether what shards share stays as it is."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_iet.shards.ema import copied_modules, frozen_modules, tensors_beside
from lightning_iet.utilities.lightning import lightning_classes


@runtime_checkable
class ShardwiseCallback(Protocol):
    """A callback that keeps tensors of its own for each shard, as AGC keeps a loss bank."""

    def shard_state(self) -> dict[str, Tensor]:
        """References to the tensors of the shard at work."""

    def load_shard_state(self, state: dict[str, Tensor]) -> None:
        """Put another shard's tensors in place, by reference."""


@dataclass
class ShardState:
    """One shard's model, optimizer and whatever else it does not share with others.

    Random generators are not in it: every step of every shard seeds them anew from (seed, shard, epoch, step).
    """

    flat: dict[torch.dtype, Tensor]
    """Trainable parameters, EMA and floating buffers; see :class:`~lightning_iet.shards.FlatLayout`."""
    counters: list[Tensor] = field(default_factory=list)
    """Integer and boolean buffers, kept by each shard and never averaged."""
    optimizers: list[tuple[dict[Any, Any], list[dict[str, Any]]]] = field(default_factory=list)
    """State by parameter of each optimizer, and the options (learning rate …) of its parameter groups."""
    schedulers: list[dict[str, Any]] = field(default_factory=list)
    """State of each LR scheduler."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the AMP gradient scaler."""
    callbacks: list[dict[str, Tensor]] = field(default_factory=list)
    """State of each shard-wise callback."""

    def fork(self) -> "ShardState":
        """A state for another shard that starts where this one does."""
        return self.map(lambda name, tensor: tensor.clone())

    def map(self, function: Callable[[str, Tensor], Tensor]) -> "ShardState":
        """A state with ``function(name, tensor)`` in the place of each tensor, and copies of everything else.

        Names say where a tensor belongs, so that they are the same for all shards of a run.
        """

        def apply(prefix: str, values: dict[Any, Any]) -> dict[Any, Any]:
            return {
                key: function(f"{prefix}/{key}", value) if isinstance(value, Tensor) else copy.deepcopy(value)
                for key, value in values.items()
            }

        return ShardState(
            flat=apply("flat", self.flat),
            counters=[function(f"counter/{number}", counter) for number, counter in enumerate(self.counters)],
            # Keys are the model's parameters, which all shards share as objects: only values are mapped.
            optimizers=[
                (
                    {
                        parameter: apply(f"optimizer/{which}/{number}", values)
                        for number, (parameter, values) in enumerate(state.items())
                    },
                    copy.deepcopy(options),
                )
                for which, (state, options) in enumerate(self.optimizers)
            ],
            schedulers=copy.deepcopy(self.schedulers),
            scaler=copy.deepcopy(self.scaler),
            callbacks=[apply(f"callback/{number}", state) for number, state in enumerate(self.callbacks)],
        )


def shard_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that training changes: (floating ones, counters), by name.

    Trainable parameters, all buffers, and averages of the weights (an EMA has no gradients, and yet changes) in
    whatever form: an ``AveragedModel``, a deep copy, plain tensors, or what Lightning's ``WeightAveraging`` keeps.
    Frozen parameters, and the buffers of modules that have no others, are left out: shards share them.

    Example:
        >>> floats, counters = shard_tensors(nn.BatchNorm1d(2))
        >>> list(floats), list(counters)
        (['weight', 'bias', 'running_mean', 'running_var'], ['num_batches_tracked'])
    """
    copied = {id(p) for part in copied_modules(module) for p in part.parameters()}
    tensors: dict[str, Tensor] = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or id(parameter) in copied
    }
    fixed = {id(buffer) for buffer in frozen_buffers(module).values()}
    tensors.update({name: buffer for name, buffer in module.named_buffers() if id(buffer) not in fixed})
    averages = [
        (f"{type(callback).__name__}.{name}", average)
        for callback in weight_averagings(getattr(module, "_trainer", None))
        for name, average in _averages(callback, tensors)
    ]
    tensors.update({place.name: place.get() for place in tensors_beside(module)[0]})
    tensors.update(averages)
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() or tensor.is_complex()}
    return floats, {name: tensor for name, tensor in tensors.items() if name not in floats}


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that shards share, by name: whatever of a module :func:`shard_tensors` leaves out."""
    kept = {id(tensor) for tensors in shard_tensors(module) for tensor in tensors.values()}
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if id(tensor) not in kept}


def frozen_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers of modules without any trained parameter, such as tables; but not statistics, which a forward changes."""
    owners = {id(part) for frozen in frozen_modules(module) for part in frozen.modules()}
    return {
        f"{path}.{name}": buffer
        for path, part in module.named_modules()
        if id(part) in owners and not hasattr(part, "track_running_stats")
        for name, buffer in part.named_buffers(recurse=False)
    }


def weight_averagings(trainer: Trainer | None) -> list[Any]:
    """Lightning's own callbacks that keep an average model, such as ``EMAWeightAveraging``."""
    callbacks = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, lightning_classes("callbacks.WeightAveraging"))]


def _averages(callback: Any, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What a callback keeps of the tensors that training changes, and its count of updates."""
    average = callback._average_model
    if average is None:
        return
    kept = {**dict(average.module.named_parameters()), **dict(average.module.named_buffers())}
    yield from ((name, kept[name]) for name in tensors if name in kept)
    yield "n_averaged", average.n_averaged


def capture(trainer: Trainer, flat: dict[torch.dtype, Tensor], counters: Iterable[Tensor]) -> ShardState:
    """Take the shard at work out of the trainer: by reference where it can be, nothing is copied."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return ShardState(
        flat=flat,
        counters=[counter.data for counter in counters],
        optimizers=[(dict(optimizer.state), _options(optimizer)) for optimizer in trainer.optimizers],
        schedulers=[copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        scaler=scaler.state_dict() if scaler is not None else {},
        callbacks=[callback.shard_state() for callback in shardwise_callbacks(trainer)],
    )


def install(trainer: Trainer, state: ShardState, counters: Iterable[Tensor]) -> None:
    """Put a shard to work: the reverse of :func:`capture`, but for the flat tensors, which the layout installs."""
    for live, counter in zip(counters, state.counters, strict=True):
        live.data = counter
    for optimizer, (values, options) in zip(trainer.optimizers, state.optimizers, strict=True):
        optimizer.state = defaultdict(dict, values)
        for group, saved in zip(optimizer.param_groups, options, strict=True):
            group.update(saved)
    for config, saved in zip(trainer.lr_scheduler_configs, state.schedulers, strict=True):
        config.scheduler.load_state_dict(copy.deepcopy(saved))
    if state.scaler:
        trainer.precision_plugin.scaler.load_state_dict(state.scaler)  # type: ignore[attr-defined]
    for callback, saved in zip(shardwise_callbacks(trainer), state.callbacks, strict=True):
        callback.load_shard_state(saved)


def shardwise_callbacks(trainer: Trainer) -> list[ShardwiseCallback]:
    """The trainer's callbacks that keep a state for each shard."""
    return [callback for callback in trainer.callbacks if isinstance(callback, ShardwiseCallback)]  # type: ignore[attr-defined]


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    # A learning rate may be a tensor (capturable optimizers); a scheduler then changes it in place.
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class FrozenWatch:
    """Remembers a number for each tensor that shards share, and refuses to go on when one has changed.

    Args:
        module: About to be trained.

    Example:
        >>> module = nn.Linear(2, 2).requires_grad_(False)
        >>> watch = FrozenWatch(module)
        >>> watch.check()
        >>> module.bias.data += 1
        >>> watch.check()
        Traceback (most recent call last):
        ...
        lightning.fabric.utilities.exceptions.MisconfigurationException: ParameterAveragingCallback expected ...
    """

    def __init__(self, module: nn.Module) -> None:
        self._tensors = frozen_tensors(module)
        self._before = self._prints()

    def check(self) -> None:
        """Compare.

        Raises:
            MisconfigurationException: If a tensor is not what it was: the next shard would start from it.
        """
        changed = (self._prints() != self._before).tolist()
        names = [name for name, change in zip(self._tensors, changed, strict=True) if change]
        if names:
            raise MisconfigurationException(
                f"ParameterAveragingCallback expected frozen tensors to stay as they are, but got changes of "
                f"{len(names)}, '{names[0]}' the first: shards would share them. Keep an average of weights as a deep "
                "copy of the whole network, or as torch.optim.swa_utils.AveragedModel; keep other state as buffers of "
                "a module that is trained."
            )

    def _prints(self) -> Tensor:
        """The sum of each tensor's bits, read as integers."""
        return torch.stack([torch.zeros((), dtype=torch.int64), *map(_print, self._tensors.values())])[1:]


def _print(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().flatten()
    return flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)
