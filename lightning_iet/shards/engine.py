"""The shard models of one process: whose turn it is, which one is in the module, and how all of them are averaged."""

import copy
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_iet.data.shard_sampler import ShardSampler
from lightning_iet.functional.averaging import average_
from lightning_iet.functional.sharding import ShardStep, walk
from lightning_iet.shards.groups import gather_objects
from lightning_iet.shards.layout import FlatLayout, shard_tensors
from lightning_iet.shards.state import (
    Flat,
    Offload,
    ShardState,
    ShardwiseCallback,
    capture,
    group_options,
    install,
    make_storage,
    pack,
    unpack,
)

log = logging.getLogger(__name__)


class ShardEngine:
    """Holds the states of the shards that a process hosts, and puts one at a time into the model.

    This class does the work; :class:`~lightning_iet.callbacks.ParameterAveragingCallback` decides when.

    Args:
        trainer: A trainer about to train: model on its device, optimizers made.
        module: The model; its weights are where all shards start from.
        hosted: The shards of this process.
        sizes: Weight of every shard of the run in the average.
        callbacks: Whatever else keeps a state for each shard.
        group: Processes that together host every shard once; ``None`` for one process.
        offload: Where the states of inactive shards lie; see
            :class:`~lightning_iet.callbacks.ParameterAveragingCallback`.

    Attributes:
        layout: Where each shard's floating tensors lie in its flat copy.
        trained: Names of those that train, or have trained.
        is_extended: Whether something has begun to train since the start.
        active: The shard that is in the model; ``None`` before the first one is.
        agreed: Whether no shard has taken a step since the last averaging.
        is_averaging: Whether an averaging has begun and not ended: the states are then undefined.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        hosted: Sequence[int],
        sizes: Sequence[float],
        callbacks: Sequence[ShardwiseCallback] = (),
        group: dist.ProcessGroup | None = None,
        offload: Offload = "none",
    ) -> None:
        self.trainer = trainer
        self.sizes = list(sizes)
        self.callbacks = callbacks
        self.group = group
        self.agreed = True
        self.active: int | None = None
        self.is_averaging = False
        self._average_is_shown = False
        floats, counters = shard_tensors(module)
        self.trained = _trained(module)
        self.is_extended = False
        self._flags = [parameter.requires_grad for parameter in module.parameters()]
        self.layout = FlatLayout(floats, first=self.trained)
        self._counters = list(counters.values())
        first = capture(trainer, self.layout.flatten(), self._counters, callbacks)
        self._live = first.flat
        self.storage = make_storage(trainer, self.layout, first.flat, num_hosted=len(hosted), offload=offload)
        self.states: dict[int, ShardState] = {}
        for shard in hosted:
            state = first.fork() if self.storage.keeps_tensors and self.states else first
            self.states[shard] = self.storage.store(shard, state)
        self.layout.install(self._live)
        self._buffers = [
            (owner, name, buffer)
            for owner in module.modules()
            for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False)
        ]

    # --- one shard at a time -----------------------------------------------------------------------------------------

    def activate(self, shard: int) -> None:
        """Put a shard into the model in the place of another."""
        self.hide_average()
        if shard == self.active:
            return
        self.park()
        # Gradients that a shard leaves behind (manual optimization that accumulates) must not reach the next one.
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        state = self.storage.load(self.states[shard])
        self._show(state.flat)
        install(self.trainer, state, self._counters, self.callbacks)
        self.active = shard

    def park(self) -> None:
        """Update the state of the active shard; it stays active."""
        if self.active is None:
            return
        # A module may have put a new tensor in a buffer's place (``n = n + 1``): copy its value into ours.
        for owner, name, ours in self._buffers:
            theirs = getattr(owner, name)
            if theirs is not ours:
                ours.data.copy_(theirs)
                setattr(owner, name, ours)
        flat = self._live
        if self._average_is_shown:
            flat = self.states[self.active].flat
        elif not self.layout.holds(flat):
            # Weights were replaced instead of changed in place: copy their values.
            for dtype, fresh in self.layout.flatten().items():
                flat[dtype].copy_(fresh)
            self.layout.install(flat)
        state = capture(self.trainer, flat, self._counters, self.callbacks)
        self.states[self.active] = self.storage.store(self.active, state)

    def release(self) -> None:
        """Leave the model with the weights that it shows, in memory of its own, and forget the shards."""
        self.hide_average()
        self.layout.release()
        self.states.clear()

    def _show(self, flat: Flat) -> None:
        """Point the model at flat tensors on the device."""
        self._live = flat
        self.layout.install(flat)

    def _show_active(self) -> None:
        """Show the active shard; where none is (the process only waits for others), the first."""
        shard = next(iter(self.states)) if self.active is None else self.active
        self._show(self.storage.load_flat(self.states[shard].flat))

    # --- what trains from now on -------------------------------------------------------------------------------------

    @property
    def own_tensors(self) -> list[Tensor]:
        """The live tensors that each shard has its own of."""
        return [*self.layout.tensors.values(), *self._counters]

    def options(self) -> list[list[dict[str, Any]]]:
        """Return copies of the options (learning rate …) of all parameter groups, by optimizer."""
        return [group_options(optimizer) for optimizer in self.trainer.optimizers]

    def share_options(self, before: list[list[dict[str, Any]]]) -> None:
        """Give to all shards what was changed in the options of the active one: parameter groups, and values.

        ``before`` is what :meth:`options` returned before the changes.
        """
        for which, (old, new) in enumerate(zip(before, self.options(), strict=True)):
            changes = [
                {key: value for key, value in options.items() if key not in known or not _is_same(known[key], value)}
                for known, options in zip(old, new, strict=False)
            ]
            for shard, state in self.states.items():
                groups = state.optimizers[which][1]
                if shard != self.active:
                    for group, change in zip(groups, changes, strict=False):
                        group.update(copy.deepcopy(change))
                groups.extend(copy.deepcopy(new[len(groups) :]))

    def extend(self, module: LightningModule) -> list[str]:
        """Take in what has begun to train, such as layers that were unfrozen; all shards start it from the same values.

        What does not train any more stays each shard's own.

        Returns:
            Names of the tensors that are new.
        """
        flags = [parameter.requires_grad for parameter in module.parameters()]
        if flags == self._flags:
            return []
        self._flags = flags
        floats, counters = shard_tensors(module)
        known = self.layout.tensors
        found = [name for name in floats if name not in known]
        own = {id(counter) for counter in self._counters}
        others = {name: counter for name, counter in counters.items() if id(counter) not in own}
        self.trained |= _trained(module)
        if found or others:
            self._replace_layout({**floats, **known}, list(others.values()))
        return [*found, *others]

    def extend_as(
        self, module: LightningModule, names: Sequence[str], trained: Collection[str], training: Collection[str]
    ) -> None:
        """Take in what had begun to train in the run of a checkpoint; does nothing if the model is another one.

        Args:
            module: The model.
            names: Of the tensors in the checkpoint's flat copies, in order.
            trained: Those that trained at any time.
            training: Those that trained when it was written.
        """
        parameters = dict(module.named_parameters())
        live = {**parameters, **dict(module.named_buffers()), **self.layout.tensors}
        if set(names) >= set(self.layout.tensors) and set(names) <= set(live):
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in training)  # hooks that said so will not be called again
            self.extend(module)
            self.trained = set(trained)
            self._replace_layout({name: live[name] for name in names}, [])

    def _replace_layout(self, tensors: Mapping[str, Tensor], counters: Sequence[Tensor]) -> None:
        self.hide_average()
        self.park()
        layout = FlatLayout(tensors, first=self.trained)
        for shard, state in self.states.items():
            flat = layout.flatten()
            views = layout.views(flat)
            for name, tensor in self.layout.views(state.flat).items():
                views[name].copy_(tensor)
            more = [counter.detach().clone() for counter in counters]
            self.states[shard] = self.storage.store(shard, replace(state, flat=flat, counters=[*state.counters, *more]))
        self.layout, self.is_extended = layout, True
        self._counters += counters
        self._show_active()
        if self.active is not None:
            for live, counter in zip(self._counters, self.storage.load(self.states[self.active]).counters, strict=True):
                live.data = counter

    # --- the average -------------------------------------------------------------------------------------------------

    def average(self) -> Tensor:
        """End a round: every shard continues from the average of all. A collective.

        Returns:
            How far each of this process's shard models was from the average, as the norm of the difference of the
            trained parameters over the norm of their average, float64, shape ``(hosted shards,)``.
        """
        self.hide_average()
        self.park()
        self.is_averaging = True
        device = next(iter(next(iter(self.states.values())).flat.values())).device
        precise = torch.float64 if device.type == "cpu" else torch.float32  # not all accelerators have float64
        squared = torch.zeros(len(self.states), dtype=precise, device=device)
        norm = torch.zeros((), dtype=precise, device=device)
        for dtype, flats in self._flats().items():
            split = self.layout.first_lengths.get(dtype, 0)
            trained, others = ([flat[part] for flat in flats] for part in (slice(split), slice(split, None)))
            if split:
                average_(trained, self.sizes, group=self.group, squared_distances=squared)
                norm += torch.linalg.vector_norm(trained[0]).to(precise).square()
            if len(others[0]):
                average_(others, self.sizes, group=self.group)
        self.agreed, self.is_averaging = True, False
        self._show_active()
        return squared.double().cpu().sqrt() / norm.double().cpu().sqrt()

    @contextmanager
    def average_shown(self) -> Iterator[None]:
        """Show the average inside a block; after it the model shows what it did before. A collective."""
        shown_before = self._average_is_shown
        self.show_average()
        try:
            yield
        finally:
            if not shown_before:
                self.hide_average()

    def show_average(self) -> None:
        """Let the model show the average while every shard keeps its own weights. A collective."""
        if self.agreed or self._average_is_shown:
            return
        self.park()
        average = self.storage.empty(self.layout)
        for dtype, flats in self._flats().items():
            average_(flats, self.sizes, into=[average[dtype]], group=self.group)
        self._average_is_shown = True
        self._show(self.storage.load_flat(average))

    def hide_average(self) -> None:
        """Put the weights back that were there before :meth:`show_average`."""
        if self._average_is_shown:
            self._show_active()
            self._average_is_shown = False

    def _flats(self) -> dict[torch.dtype, list[Tensor]]:
        """Return the flat tensors of this process's shards, by dtype."""
        return {dtype: [state.flat[dtype] for state in self.states.values()] for dtype in self.layout.lengths}

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """Return the states of this process's shards, in plain types, by shard."""
        self.park()
        return {shard: pack(state, self.trainer.optimizers) for shard, state in self.states.items()}

    def load_state_dict(self, states: Mapping[int, dict[str, Any]], *, agreed: bool) -> None:
        """Restore what :meth:`state_dict` returned, of at least this process's shards; then no shard is active."""
        for shard, state in self.states.items():
            loaded = unpack(states[shard], into=state, optimizers=self.trainer.optimizers, device=self.layout.device)
            self.states[shard] = self.storage.store(shard, loaded)
        self.active, self.agreed = None, agreed
        self._show_active()
        for live, counter in zip(self._counters, next(iter(self.states.values())).counters, strict=True):
            live.data = counter.to(live.device, copy=True)


def _trained(module: LightningModule) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def _is_same(value: Any, other: Any) -> bool:
    """Whether two options of a parameter group are equal; a learning rate may be a tensor."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return torch.equal(value, other)
    return type(value) is type(other) and bool(value == other)


# --- whose turn it is -------------------------------------------------------------------------------------------------


@dataclass
class OwnShard:
    """The part of :class:`~lightning_iet.data.ShardSampler` that is used here, for one shard on each process."""

    rank: int
    sizes: list[int]
    steps: int
    round_steps: int | None = None
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def hosted(self) -> range:
        """This process's shard."""
        return range(self.rank, self.rank + 1)

    def walk(self, epoch: int) -> list[ShardStep]:
        """Return the steps of an epoch. A resumed epoch continues where the user's own loader does."""
        return walk(self.hosted, self.steps, epoch=epoch, round_steps=self.round_steps)

    def __len__(self) -> int:
        return self.steps


def own_shard(trainer: Trainer, round_steps: int | None = None) -> OwnShard:
    """Find out how large the shards of all processes are; all then take as many steps as the smallest has.

    Raises:
        MisconfigurationException: If a ``DistributedSampler`` deals the samples out anew in each epoch, or the length
            of an epoch is not known.
    """
    loader: Any = trainer.train_dataloader
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        raise MisconfigurationException(
            "ParameterAveragingCallback expected every process to read a fixed shard, but got a DistributedSampler, "
            "which deals the samples out anew in each epoch. Use Trainer(use_distributed_sampler=False) with data "
            "of its own on each process, or ShardedDataModule(datamodule, num_shards=…)."
        )
    if trainer.num_training_batches == float("inf") or trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "ParameterAveragingCallback expected training data of one known length on each process, but got an "
            "iterable without one, or reload_dataloaders_every_n_epochs. Use a map-style data set, or set "
            "limit_train_batches."
        )
    # A shard of unknown size is weighted by its batches.
    sized = isinstance(loader, DataLoader) and hasattr(loader.dataset, "__len__")
    size = len(loader.dataset) if sized else int(trainer.num_training_batches)
    everyone = gather_objects((size, trainer.num_training_batches), trainer.world_size)
    sizes, steps = [size for size, _ in everyone], [int(steps) for _, steps in everyone]
    if len(set(steps)) > 1:
        log.warning("Shards have %s batches; each epoch takes the first %d of every shard.", steps, min(steps))
        trainer.fit_loop.max_batches = min(steps)
        if isinstance(trainer.val_check_interval, float):
            trainer.val_check_batch = max(1, int(min(steps) * trainer.val_check_interval))
    return OwnShard(trainer.global_rank, sizes, min(steps), round_steps)


class ShardSchedule:
    """Says which shard a batch trains, and counts the steps of each shard.

    Args:
        sampler: Orders this process's batches.
        resumed: What :meth:`record` returned, for a resumed run; empty for a new one.
    """

    def __init__(self, sampler: ShardSampler | OwnShard, *, resumed: Mapping[str, Any]) -> None:
        self.sampler = sampler
        self.resumed_epoch: int = resumed.get("epoch", -1)
        self.resumed_done: Sequence[int] = resumed.get("done", ())
        self.epoch = self.resumed_epoch
        self.done = {shard: self.resumed_done[shard] if self.resumed_done else 0 for shard in sampler.hosted}
        self._walk: list[ShardStep] | None = None

    def at(self, epoch: int, batch_idx: int) -> ShardStep:
        """Return the step of a batch of the epoch."""
        if epoch != self.epoch or self._walk is None:
            self.epoch = epoch
            self._walk = self.sampler.walk(epoch)
            done = self.resumed_done if epoch == self.resumed_epoch else ()
            self.done = {shard: done[shard] if done else 0 for shard in self.done}
        # A resumed epoch holds what is left of it: the last batches.
        return self._walk[batch_idx - len(self.sampler) + len(self._walk)]

    def is_last(self, batch_idx: int) -> bool:
        """Whether the epoch ends with this batch."""
        return batch_idx + 1 == len(self.sampler)

    def count(self, step: ShardStep) -> bool:
        """Count a finished step; return whether it was its shard's last one in the epoch."""
        if step.shard is None:
            return False
        self.done[step.shard] = step.step + 1
        return step.step + 1 == self.sampler.steps

    def batches_before(self) -> int:
        """Return the number of this process's batches that a resumed epoch has behind it."""
        left = len(self.sampler.walk(self.resumed_epoch)) if self.resumed_done else 0
        return len(self.sampler) - left

    def record(self, world_size: int) -> dict[str, Any]:
        """Return the epoch, and the steps of every shard in it (none: it has yet to begin). A collective."""
        everyone = gather_objects(self.done, world_size)
        by_shard = {shard: steps for part in everyone for shard, steps in part.items()}
        # Among batches whose gradients are accumulated, the checkpoint stands before the first: all are taken again.
        window = self.sampler.plan.multiple_of if isinstance(self.sampler, ShardSampler) else 1
        done = [steps // window * window for _, steps in sorted(by_shard.items())]
        finished = set(done) == {self.sampler.steps}
        return {"epoch": max(self.epoch, 0) + finished, "done": [] if finished else done}
