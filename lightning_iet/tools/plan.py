"""Say what a run will cost: ``lightning-iet plan`` takes the options of ``fit``."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import rich
import torch
from rich.table import Table
from torch import nn

from lightning_iet.callbacks.anti_gradient_control.callback import AntiGradientControl
from lightning_iet.callbacks.augmentation import ThresholdAwareAugmentation
from lightning_iet.callbacks.parameter_averaging.callback import ParameterAveragingCallback
from lightning_iet.callbacks.parameter_averaging.checks import check_trainer, limit_per_shard
from lightning_iet.callbacks.parameter_selection import ParameterSelection
from lightning_iet.callbacks.redistribution import Redistribution
from lightning_iet.data.shard_sampler import ShardPlan, ShardSampler
from lightning_iet.data.sharding import ShardedDataModule
from lightning_iet.functional.checks import check_at_least
from lightning_iet.modules.svdiff import spectral_shifts
from lightning_iet.shards.layout import frozen_tensors, shard_tensors
from lightning_iet.utilities.devices import peak_memory
from lightning_iet.utilities.files import write_json
from lightning_iet.utilities.lightning import find_callback
from lightning_iet.utilities.text import in_words

_UNKNOWN = "not known"
_METHODS = (  # which take their time in a step; an evaluation takes it after the last one
    AntiGradientControl,
    ParameterAveragingCallback,
    ParameterSelection,
    Redistribution,
    ThresholdAwareAugmentation,
)


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a module in training.

    Attributes:
        trained: Number of parameters that are trained.
        frozen: Number of others, which shards share; averages of the weights are not counted.
        averaged: Bytes that an averaging takes of each shard: trained weights, their moving average, buffers.
        optimizer: Bytes of the optimizer's state, once it has taken a step; None where it cannot be told.
        gradients: Bytes of the gradients.
        shared: Bytes of what shards share.
        bases: Bytes of SV-DIFF's decompositions, which shards share as well.
        forming: Floating-point operations that form SV-DIFF's weights once.
    """

    trained: int
    frozen: int
    averaged: int
    optimizer: int | None
    gradients: int
    shared: int
    bases: int = 0
    forming: int = 0

    @property
    def shard(self) -> int:
        """Bytes of one shard's state."""
        return self.averaged + (self.optimizer or 0)

    def checkpoint(self, num_shards: int) -> int:
        """Bytes of a checkpoint: the weights of the model, and the state of each shard beside them.

        Args:
            num_shards: Of the run; one has no weights of its own.

        Example:
            >>> size = ModelSize(trained=10, frozen=0, averaged=80, optimizer=80, gradients=40, shared=8)
            >>> size.checkpoint(1), size.checkpoint(4)
            (168, 728)
        """
        states = num_shards * self.shard if num_shards > 1 else self.optimizer or 0
        return self.averaged + self.shared + states


def model_size(module: nn.Module) -> ModelSize:
    """Count a module's parameters, and the bytes that training makes of them.

    Args:
        module: With ``module.optimizer``, which makes an optimizer from parameters, as
            :class:`~lightning_iet.modules.DiffusionModule` has it, the optimizer's state is counted too.

    Example:
        >>> module = nn.Linear(9, 1)
        >>> module.optimizer = torch.optim.Adam
        >>> model_size(module)
        ModelSize(trained=10, frozen=0, averaged=40, optimizer=80, gradients=40, shared=0, bases=0, forming=0)
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    floats, _ = shard_tensors(module)
    others = frozen_tensors(module)
    number, gradients = sum(p.numel() for p in trained), _bytes(trained)
    make = getattr(module, "optimizer", None)
    bases = {id(shift.basis): shift.basis for shift in spectral_shifts(module).values()}.values()
    return ModelSize(
        trained=number,
        frozen=sum(tensor.numel() for tensor in others.values()),
        averaged=_bytes(floats.values()),
        optimizer=None if make is None else round(_state_per_parameter(make) * number),
        gradients=gradients,
        shared=_bytes(others.values()),
        bases=sum(basis.nbytes for basis in bases),
        forming=sum(basis.flops for basis in bases),
    )


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _state_per_parameter(make: Callable[..., Any]) -> float:
    """Bytes that an optimizer keeps for each parameter, from a step with a few."""
    weight = nn.Parameter(torch.zeros(64))
    weight.grad = torch.zeros_like(weight)
    optimizer = make([weight])
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return _bytes(value for value in kept if value.numel() == 64) / 64


@dataclass(frozen=True)
class Schedule:
    """How long a run is.

    Attributes:
        shard_sizes: Training samples of each shard.
        processes: Number of processes, W.
        epoch_steps: Optimizer steps of each shard in an epoch.
        epochs: Number of epochs; None = no limit.
        max_steps: Limit of a process's optimizer steps; None = none.
        round_epochs: Epochs between two averagings; None = counted in steps.
        round_optimizer_steps: Optimizer steps of each shard between two averagings; None = counted in epochs.

    Example:
        >>> ten = Schedule((5000,) * 10, 2, epoch_steps=40, epochs=1000, max_steps=None, round_epochs=100)
        >>> ten.hosted, ten.steps, ten.process_steps, ten.averagings
        (5, 40000, 200000, 10)
    """

    shard_sizes: tuple[int, ...]
    processes: int
    epoch_steps: int
    epochs: int | None
    max_steps: int | None
    round_epochs: int | None = None
    round_optimizer_steps: int | None = None

    @property
    def hosted(self) -> int:
        """Shards of each process, which takes them in turn."""
        return max(len(self.shard_sizes) // self.processes, 1)

    @property
    def steps(self) -> int | None:
        """Optimizer steps of each shard in the run; None = no limit is set."""
        limits = [] if self.epochs is None else [self.epochs * self.epoch_steps]
        limits += [] if self.max_steps is None else [self.max_steps]
        return min(limits) if limits else None

    @property
    def process_steps(self) -> int | None:
        """Optimizer steps of each process."""
        return None if self.steps is None else self.steps * self.hosted

    @property
    def averagings(self) -> int | None:
        """Averagings in the run, the one at its end included."""
        if len(self.shard_sizes) == 1:
            return 0
        if self.steps is None:
            return None
        return ceil(self.steps / (self.round_optimizer_steps or (self.round_epochs or 1) * self.epoch_steps))


@dataclass(frozen=True)
class Cost:
    """All that is known of a run before it starts.

    Attributes:
        size: Of the model.
        schedule: Of the run.
        step_seconds: Measured time of a step with its data; None = not measured.
        peak: Measured peak of the memory; None = not measured.
        device: Whose memory that was.
        is_synthetic: Whether a few random images took the place of the data, whose number is then not known.
        denoiser: Number of parameters of the denoiser, if only a part of it trains.
    """

    size: ModelSize
    schedule: Schedule
    step_seconds: float | None = None
    peak: int | None = None
    device: str = "cpu"
    is_synthetic: bool = False
    denoiser: int | None = None

    @property
    def has_length(self) -> bool:
        """Whether the steps of the run are known: of synthetic data only where their number alone limits it."""
        return not self.is_synthetic or (self.schedule.epochs is None and self.schedule.max_steps is not None)

    @property
    def memory(self) -> int:
        """Bytes in each process: states of its shards, gradients, what is shared; without activations."""
        return self.schedule.hosted * self.size.shard + self.size.gradients + self.size.shared + self.size.bases

    @property
    def sent(self) -> float:
        """Bytes that each process sends in an averaging: 2 (W - 1) / W of one shard's, as an all-reduce does."""
        processes = min(self.schedule.processes, len(self.schedule.shard_sizes))
        return 2 * (processes - 1) / processes * self.size.averaged

    @property
    def seconds(self) -> float | None:
        """Time of the run's steps; None where it is not known."""
        steps = self.schedule.process_steps if self.has_length else None
        return None if steps is None or self.step_seconds is None else steps * self.step_seconds


def cost_table(cost: Cost) -> Table:
    """Lay a cost out as a table to print with :mod:`rich`."""
    size, schedule = cost.size, cost.schedule
    shards, averagings = len(schedule.shard_sizes), schedule.averagings
    table = Table("what", "how much", "made up of", title="What this run will cost")
    whole = cost.denoiser or size.trained + size.frozen
    of = " of the denoiser" if cost.denoiser else ""
    share = f" ({100 * size.trained / whole:.3g} %{of})" if size.frozen else ""
    table.add_row(
        "trained parameters", f"{_count(size.trained)}{share}", f"{_count(size.frozen)} frozen ones beside them"
    )
    sizes = sorted(set(schedule.shard_sizes))
    images = f"{' to '.join(f'{n:,}' for n in (sizes[0], sizes[-1])[: len(sizes)])} images"
    table.add_row("shards", str(shards), "size not known, for the data are synthetic" if cost.is_synthetic else images)
    table.add_row("processes", str(schedule.processes), f"{schedule.hosted} shard(s) on each, in turn")
    each = "each shard: " if shards > 1 else ""
    in_epoch = "as the data are large" if cost.is_synthetic else f"{schedule.epoch_steps:,} in an epoch"
    epochs = "no limit of epochs" if schedule.epochs is None else f"{schedule.epochs:,} epochs"
    steps, of_process = (
        _count(number) if cost.has_length else _UNKNOWN for number in (schedule.steps, schedule.process_steps)
    )
    table.add_row("steps", steps, f"{each}{in_epoch}, {epochs}")
    if schedule.hosted > 1:
        table.add_row("steps of a process", of_process, f"those of its {schedule.hosted} shards")
    table.add_section()
    optimizer = "of the optimizer: not known" if size.optimizer is None else f"optimizer {in_mib(size.optimizer)}"
    made = f"{schedule.hosted} × (weights, averages {in_mib(size.averaged)} + {optimizer})"
    made += f" + gradients {in_mib(size.gradients)}" + (f" + frozen {in_mib(size.shared)}" if size.shared else "")
    made += f" + SV-DIFF's bases {in_mib(size.bases)}" if size.bases else ""
    table.add_row("memory of a process", in_mib(cost.memory), f"{made}; activations come on top")
    kept = "; of each shard, these and optimizer's state" if shards > 1 else ", optimizer's state"
    table.add_row("a checkpoint", in_mib(size.checkpoint(shards)), f"weights, averages{kept}")
    if size.bases:
        table.add_row("SV-DIFF", f"{size.forming / 1e12:.3g} TFLOP", "in each forward pass, and as many backward")
    if cost.peak is not None:
        table.add_row("measured peak", in_mib(cost.peak), f"memory of {cost.device}, with activations")
    if shards > 1:
        table.add_section()
        table.add_row("an averaging", in_mib(shards * size.averaged), f"{shards} × weights and their averages")
        # A round of epochs is a share of the run, however long.
        if cost.has_length or schedule.round_optimizer_steps is None:
            all_bytes = None if averagings is None else averagings * shards * size.averaged
            table.add_row("averagings", _count(averagings), f"{in_mib(all_bytes)} in all")
        else:
            table.add_row("averagings", _UNKNOWN, "")
        if schedule.processes > 1:
            table.add_row("sent by a process", in_mib(cost.sent), "in an averaging; between them, nothing")
    table.add_section()
    if cost.step_seconds is None:
        table.add_row("time", "not measured", "--measure_steps 5 takes a few steps to tell")
    else:
        length = in_words(cost.seconds) if cost.has_length else _UNKNOWN
        table.add_row("time", length, f"{cost.step_seconds:.3g} s for each step, data included")
    return table


def _count(number: int | None) -> str:
    return "no limit" if number is None else f"{number:,}"


def in_mib(number: float | None) -> str:
    """Bytes for people.

    Example:
        >>> [in_mib(number) for number in (0, 5e6, 3e9, None)]
        ['0.0 MiB', '4.8 MiB', '2.8 GiB', 'no limit']
    """
    if number is None:
        return "no limit"
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


class PlanningTrainer(pl.Trainer):
    """A trainer that can also say what training will cost.

    Attributes:
        is_measuring: Whether it trains to measure the time of a step.
    """

    is_measuring = False

    def plan(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: Path | None = None,
        weights_only: bool | None = None,
        measure_steps: int = 0,
        out: Path | None = None,
    ) -> Cost:
        """Print what a run will cost before it starts: steps, memory, bytes averaged, time.

        The data are set up, for their number; the model is built. Of synthetic data, which are a few random images,
        neither the steps of epochs nor a time is named.

        Args:
            model: What would be trained.
            datamodule: Where the samples come from.
            ckpt_path: Ignored: configurations of ``fit`` may hold it.
            weights_only: Likewise.
            measure_steps: Take so many steps, and two before them, for an estimate of the time; 0 = none.
            out: Also write steps and seconds into this file, as JSON.

        Returns:
            The cost.

        Raises:
            ValueError: If there is no data module, or steps are to be measured on several processes.
        """
        if datamodule is None:
            raise ValueError("Argument `data` expected a data module to plan with, but got none. Give one as --data.")
        check_at_least(0, measure_steps=measure_steps)
        if measure_steps and self.world_size > 1:
            raise ValueError(
                f"Argument `measure_steps` expected 0 for {self.world_size} processes, but got {measure_steps}. "
                "Measure on one process (--trainer.devices 1)."
            )
        averaging = find_callback(self, ParameterAveragingCallback)
        if averaging is not None and averaging.num_shards != 1:
            check_trainer(
                self, model, round_steps=averaging.every_n_train_steps
            )  # a run that would be refused has no cost
        selection = find_callback(self, ParameterSelection)
        if selection is not None and not selection.apply(model):
            raise ValueError("Argument `family` expected a model whose denoiser is there from the start, but got none.")
        datamodule.prepare_data()
        datamodule.setup("fit")
        synthetic = bool(getattr(getattr(datamodule, "datamodule", datamodule), "synthetic", False))
        device = str(self.strategy.root_device)
        groups = None if selection is None else selection.parameter_groups
        cost = Cost(
            model_size(model),
            schedule_of(self, datamodule),
            device=device,
            is_synthetic=synthetic,
            denoiser=None if groups is None else groups.total,
        )
        if measure_steps:
            self.is_measuring = True
            cost = _measured(self, model, datamodule, cost, steps=measure_steps)
            self.is_measuring = False
        rich.get_console().print(cost_table(cost))
        if out is not None:
            write_json(Path(out), {"steps": cost.schedule.process_steps, "seconds": cost.seconds})
        return cost


def schedule_of(trainer: pl.Trainer, datamodule: pl.LightningDataModule) -> Schedule:
    """Return how long a run of a trainer is.

    Args:
        trainer: Not started.
        datamodule: Set up.
    """
    averaging = find_callback(trainer, ParameterAveragingCallback)
    epochs = 1000 if trainer.max_epochs is None and trainer.max_steps == -1 else trainer.max_epochs  # Lightning's own
    round_batches = None if averaging is None else averaging.every_n_train_steps
    return Schedule(
        *_steps(trainer, datamodule, averaging),
        epochs=None if epochs in (None, -1) else epochs,
        max_steps=None if trainer.max_steps == -1 else trainer.max_steps,
        round_epochs=None if averaging is None else averaging.every_n_epochs,
        round_optimizer_steps=None if round_batches is None else ceil(round_batches / trainer.accumulate_grad_batches),
    )


def _steps(
    trainer: pl.Trainer, datamodule: pl.LightningDataModule, averaging: ParameterAveragingCallback | None
) -> tuple[tuple[int, ...], int, int]:
    """Sizes of the shards, number of processes, optimizer steps of each shard in an epoch."""
    processes, accumulated = trainer.world_size, trainer.accumulate_grad_batches
    if isinstance(datamodule, ShardedDataModule) and datamodule.num_shards > 1:
        datamodule.plan = ShardPlan(
            num_shards=datamodule.num_shards,
            num_processes=processes,
            round_steps=None if averaging is None else averaging.every_n_train_steps,
            multiple_of=accumulated,
            limit=limit_per_shard(trainer, datamodule.num_shards),
        )
        sampler = datamodule.train_dataloader().sampler
        assert isinstance(sampler, ShardSampler)  # noqa: S101 (what a sharded loader has)
        return tuple(len(shard) for shard in sampler.shards), processes, sampler.steps // accumulated
    loader: Any = datamodule.train_dataloader()
    batches, limit = -(-len(loader) // processes), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return (len(loader.dataset),), processes, -(-batches // accumulated)


# --- measuring --------------------------------------------------------------------------------------------------------


class _Clock(pl.Callback):
    """Measures the time between the ends of batches, waiting for data included, then ends the training."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.ends.append(time.perf_counter())
        trainer.should_stop = len(self.ends) >= self.batches


def _measured(
    trainer: pl.Trainer, model: pl.LightningModule, datamodule: pl.LightningDataModule, cost: Cost, *, steps: int
) -> Cost:
    """Train for a few steps of the first shard, as the run would begin; nothing but the methods is called."""
    accumulated = trainer.accumulate_grad_batches
    clock = _Clock((steps + 2) * accumulated)
    trainer.callbacks = [*(c for c in trainer.callbacks if isinstance(c, _METHODS)), clock]  # type: ignore[attr-defined]
    trainer.loggers = []
    trainer.limit_val_batches = trainer.num_sanity_val_steps = 0
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = -1, -1
    trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
    if cost.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(model, datamodule=datamodule)
    # The first two steps make room, and compile.
    spans = [end - start for start, end in pairwise(clock.ends[2 * accumulated - 1 :])]
    peak = torch.cuda.max_memory_allocated() if cost.device.startswith("cuda") else peak_memory()
    seconds = statistics.median(spans) * accumulated
    return replace(cost, step_seconds=seconds, peak=peak or None)
