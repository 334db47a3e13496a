"""What ParameterAveragingCallback refuses: settings that cannot work, checkpoints of other runs, shared state."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_iet.functional.sharding import num_replicas
from lightning_iet.shards.ema import Slot, averages_beside, is_users_object, unregistered_averages, weight_averagings
from lightning_iet.shards.groups import shortened
from lightning_iet.shards.state import ShardwiseCallback
from lightning_iet.utilities.fingerprints import checksums
from lightning_iet.utilities.lightning import Callback, distinct_modules, find_callbacks, lightning_classes


def check_split(in_data: int | None, num_shards: int, trainer: Trainer) -> None:
    """Refuse data that are not split as the run is, and numbers of processes that do not fit it.

    ``in_data`` is the number of shards into which the data are split, ``None`` if they are not.

    Raises:
        MisconfigurationException: If the numbers of shards differ.
        ValueError: If neither K nor the number of processes divides the other.
    """
    if in_data not in (None, num_shards):
        raise MisconfigurationException(
            f"Argument `num_shards` expected the same value in ShardedDataModule and in ParameterAveragingCallback, "
            f"but got {in_data} and {num_shards}."
        )
    if num_shards > 1:
        num_replicas(num_shards, trainer.world_size)
        if in_data is None and num_shards != trainer.world_size:
            _refuse(
                f"data split into {num_shards} shards, but the run has {trainer.world_size} process(es) and no "
                f"ShardedDataModule. Wrap the data module: ShardedDataModule(datamodule, num_shards={num_shards})."
            )


def check_trainer(trainer: Any, module: LightningModule, *, round_steps: int | None = None) -> None:
    """Refuse settings of the trainer and the module under which shards would not stay apart.

    ``round_steps`` is the length of a round, where it is counted in batches of a shard.

    Raises:
        MisconfigurationException: Naming the setting, and what to use instead.
    """
    if not module.automatic_optimization and trainer.world_size > 1:
        _refuse(
            "automatic optimization, but the module sets automatic_optimization=False: under DDP it turns gradient "
            "synchronisation back on after each forward. Use automatic optimization, one process, or num_shards=1."
        )
    if (round_steps or 0) % trainer.accumulate_grad_batches:
        raise MisconfigurationException(
            f"Argument `every_n_train_steps` expected a multiple of accumulate_grad_batches "
            f"({trainer.accumulate_grad_batches}), but got {round_steps}: gradients would be summed over two shards."
        )
    strategy = trainer.strategy
    if not isinstance(strategy, lightning_classes("strategies.DDPStrategy", "strategies.SingleDeviceStrategy")):
        _refuse(
            f"the strategy 'auto' or 'ddp', but got {type(strategy).__name__}, which spreads one model over processes. "
            "Use --trainer.strategy ddp, or num_shards=1."
        )
    ddp = getattr(strategy, "_ddp_kwargs", {})
    if ddp.get("static_graph"):
        _refuse(
            "DDP without static_graph, but got static_graph=True, which cannot leave gradients unsynchronised. "
            "Use DDPStrategy(static_graph=False)."
        )
    if ddp.get("process_group") is not None:
        _refuse("DDP without a process_group, but got one: it makes the groups itself. Use DDPStrategy().")
    if getattr(strategy, "_layer_sync", None) is not None:
        _refuse(
            "sync_batchnorm=False, but got True: batch statistics would mix the shards of all processes. "
            "Use Trainer(sync_batchnorm=False)."
        )
    if trainer.max_steps != -1 and not trainer.fast_dev_run:
        _refuse(
            f"max_steps=-1, but got {trainer.max_steps}: a process counts the steps of all its shards, so the run "
            "would end in the middle of a shard. Use max_epochs."
        )
    if trainer.overfit_batches:
        _refuse(
            f"overfit_batches=0, but got {trainer.overfit_batches}: it replaces the shards' samplers. "
            "Use a smaller data set, or num_shards=1."
        )
    mixing = lightning_classes("callbacks.StochasticWeightAveraging", "callbacks.GradientAccumulationScheduler")
    if callback := next(iter(find_callbacks(trainer, *mixing)), None):
        _refuse(
            f"no callback that mixes the weights or gradients of shards, but got {type(callback).__name__}. "
            "Use EMAWeightAveraging(), Trainer(accumulate_grad_batches=…)."
        )
    if (count := len(weight_averagings(trainer))) > 1:
        _refuse(
            f"at most one WeightAveraging callback, but got {count}: each would put its own average into the "
            "checkpoint. Use one."
        )


def limit_per_shard(trainer: Any, num_shards: int) -> int | None:
    """Return the batches of an epoch that `limit_train_batches` leaves to each shard; ``None`` = all.

    The limit is for the batches of all shards together, so that a run is the same on any number of processes.

    Raises:
        MisconfigurationException: If the limit leaves nothing to some shard, or is a share.
    """
    limit, least = trainer.limit_train_batches, num_shards * trainer.accumulate_grad_batches
    if not isinstance(limit, int):
        if limit == 1.0:
            return None
        _refuse(f"limit_train_batches as a number of batches, but got the share {limit}. Use an integer.")
    if limit < least and not trainer.fast_dev_run:
        _refuse(
            f"limit_train_batches to leave a step to each of the {num_shards} shards, at least {least}, but got "
            f"{limit}. Use a larger limit, or fewer shards."
        )
    return max(limit // num_shards, 1)


def check_schedulers(trainer: Trainer) -> None:
    """Refuse learning-rate schedules that cannot be kept apart by shard.

    Raises:
        MisconfigurationException: For schedules that need a metric, whose frequency spans shards, or that a module
            with manual optimization steps itself.
    """
    configs = trainer.lr_scheduler_configs
    if configs and not trainer.lightning_module.automatic_optimization:
        _refuse(
            f"no LR schedules under manual optimization, but got {len(configs)}: which shard steps them, and when, "
            "cannot be seen. Set the learning rate in training_step, or use automatic optimization."
        )
    for config in configs:
        name = type(config.scheduler).__name__
        if config.reduce_on_plateau:
            _refuse(
                f"LR schedules that step by themselves, but got {name}: its metric is one of the average, not of a "
                "shard. Use a schedule by step or epoch, or num_shards=1."
            )
        if config.interval == "step" and config.frequency != 1:
            _refuse(
                f"LR schedules by step with frequency=1, but got {config.frequency} for {name}: Lightning counts the "
                "steps of all shards of a process. Use frequency=1."
            )


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to continue another run than that of the checkpoint: names, to be read, and values of all that counts.

    Raises:
        MisconfigurationException: Naming the first difference and both values.
    """
    for name, value in current.items():
        if name in saved and saved[name] != value:
            raise MisconfigurationException(
                f"The checkpoint expected the {name} {shortened(saved[name])}, but got {shortened(value)}. "
                "Resume with the settings and data of the run that wrote it, or start afresh without `ckpt_path`."
            )


def _refuse(reason: str) -> NoReturn:
    raise MisconfigurationException(f"ParameterAveragingCallback expected {reason}")


_SKIPPED = frozenset(vars(nn.Module())) | {"_trainer", "_fabric", "_log_hyperparams", "_hparams", "_metric_attributes"}
_WRITES = ("__setitem__", "copy_", "zero_", "fill_")


@dataclass
class _Suspect:
    """A tensor that was made or changed after training began."""

    tensor: Tensor
    version: int  # number of changes in place
    steps_left: int  # in which it is looked for whether it is carried on
    checksum: int | None = None  # of an average, which may be changed as ``tensor.data`` too

    def is_changed(self, now: Tensor | None) -> bool:
        """Whether it was replaced, or changed in place."""
        if now is not self.tensor or now._version != self.version:
            return True
        return self.checksum is not None and checksums([now]).item() != self.checksum


class LateWatch:
    """Refuses state of the module or of callbacks that one shard would take over from another.

    What was made, or changed, after training began is looked at: a tensor that a step reads, and changes or replaces,
    is carried from step to step. Copies of weights that are made once or overwritten, tables, and lists of losses for
    the log are not; metrics of torchmetrics are let alone. Averages of weights, known by their shapes, are found
    whenever they are made, and watched for ten steps *(our choice)*; anything else in the first two steps.

    Args:
        trainer: About to train; its callbacks are looked at, but those of Lightning and those that keep a state by
            shard.
        module: What it trains.
        kept: The tensors that each shard has its own of.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, kept: Iterable[Tensor]) -> None:
        self._trainer, self._module = trainer, module
        self._known = _averages(module)
        self._kept = {id(tensor): tensor for tensor in (*kept, *self._known.values())}
        self._found_before = {*self._known, *(name for name, _ in module.named_buffers())}
        self._before = {name: (tensor, tensor._version) for name, tensor in self._held().items()}
        self._suspects: dict[str, _Suspect] = {}
        self._reading: _Reading | None = None
        self._stack = ExitStack()
        self._slots: list[Slot] = []
        self._checksums: dict[str, int] = {}
        self._kinds: tuple[Any, ...] = ()

    @property
    def is_watching(self) -> bool:
        """Whether something is to be looked at after the next step."""
        return bool(self._suspects)

    def check(self, steps: int) -> None:
        """Look at what is there after some steps of this process; before the first step too.

        Raises:
            MisconfigurationException: If shards would share something.
        """
        self._check_suspects()
        callbacks = [
            callback
            for callback in self._trainer.callbacks  # type: ignore[attr-defined]
            if is_users_object(callback) and not isinstance(callback, ShardwiseCallback | Callback)
        ]
        kinds = tuple(_attribute_kinds(thing) for thing in (*self._module.modules(), *callbacks))
        if kinds != self._kinds:  # a search takes longer than a short turn of a shard
            self._kinds = kinds
            self._find_averages()
            self._slots = averages_beside(self._module, *callbacks)
        self._check_callbacks()
        if steps == 1:
            for name, tensor in self._held().items():
                seen = self._before.get(name)
                if name not in self._known and (seen is None or seen[0] is not tensor or seen[1] != tensor._version):
                    self._suspects[name] = _Suspect(tensor, tensor._version, steps_left=1)
            self._before = {}

    def begin_step(self) -> None:
        """Look at what a step reads, if there is something to look for."""
        if self._suspects:
            self._reading = _Reading({id(suspect.tensor) for suspect in self._suspects.values()})
            self._stack.enter_context(self._reading)

    def end_step(self) -> None:
        """Look no longer."""
        self._stack.close()

    def _check_suspects(self) -> None:
        if self._reading is None:
            return
        held, read = self._held() | _averages(self._module), self._reading.read
        self._reading = None
        for name, suspect in list(self._suspects.items()):
            now = held.get(name)
            if id(suspect.tensor) in read and suspect.is_changed(now):
                raise MisconfigurationException(
                    f"ParameterAveragingCallback expected to find what each shard has its own of when training starts,"
                    f" but got '{name}' of the module, which was made or changed later and is carried from step to"
                    " step: the next shard would go on with it. Make it in __init__, setup or on_fit_start: averages"
                    " of the weights as a list or dict of copies, a deep copy, or an AveragedModel; anything else as a"
                    " buffer (register_buffer) of a module that is trained."
                )
            if now is None or suspect.steps_left == 1:
                del self._suspects[name]
            else:
                self._suspects[name] = _suspect_average(now, steps_left=suspect.steps_left - 1)

    def _held(self) -> dict[str, Tensor]:
        """Tensors of which nobody keeps one for each shard."""
        return {
            name: tensor
            for name, tensor in held_tensors(self._module).items()
            if id(tensor) not in self._kept and name not in self._found_before
        }

    def _find_averages(self) -> None:
        """Find those that are new, under other names than known ones too (a network that is wrapped is not)."""
        known = {id(tensor) for tensor in self._known.values()}
        for name, tensor in _averages(self._module).items():
            if name not in self._known and id(tensor) not in known:
                self._known[name] = tensor
                self._suspects[name] = _suspect_average(tensor)

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


def _suspect_average(tensor: Tensor, steps_left: int = 10) -> _Suspect:
    return _Suspect(tensor, tensor._version, steps_left, int(checksums([tensor]).item()))


def _attribute_kinds(thing: Any, depth: int = 2) -> tuple[Any, ...]:
    """The kinds of all attributes, and which containers are empty: where an average is made, this changes.

    Every turn of a shard asks it of thousands of attributes, most of which are of a few classes.
    """
    values = vars(thing)
    parts, kinds = tuple(values.values()), tuple(map(type, values.values()))
    containers, perhaps_users = _places(kinds)
    within = [_attribute_kinds(parts[i], depth - 1) for i in perhaps_users if depth and is_users_object(parts[i])]
    is_filled = [bool(parts[i]) for i in containers]
    return kinds, is_filled, within, len(values.get("_parameters", ())), len(values.get("_modules", ()))


@lru_cache(maxsize=1000)
def _places(kinds: tuple[type, ...]) -> tuple[list[int], list[int]]:
    """Which of some values, of these classes, are containers, and which may be a user's objects that are no modules."""
    plain = (bool, int, float, str, type(None))
    containers = [i for i, kind in enumerate(kinds) if issubclass(kind, list | tuple | Mapping)]
    others = [i for i, kind in enumerate(kinds) if kind not in plain and not issubclass(kind, Tensor | nn.Module)]
    return containers, others


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
