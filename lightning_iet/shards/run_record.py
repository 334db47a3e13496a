"""What a checkpoint says of a run of shards, and whether a run that goes on is the same."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

__all__ = ["check_same_everywhere", "check_same_run", "count_waiting_step", "gather_shards", "set_position"]


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that is not the one of the checkpoint.

    Args:
        saved: Identity of the run in the checkpoint: a readable name and a value for each thing that must not change.
        current: Identity of this run.

    Raises:
        MisconfigurationException: Naming the first difference and both values.
    """
    for name, value in current.items():
        if name in saved and saved[name] != value:
            raise MisconfigurationException(
                f"The checkpoint expected the {name} {_short(saved[name])}, but got {_short(value)}. "
                "Resume with the settings and data of the run that wrote it, or start afresh without `ckpt_path`."
            )


def check_same_everywhere(current: dict[str, Any], world_size: int) -> None:
    """Refuse processes that disagree about the run they are part of.

    Raises:
        MisconfigurationException: On all processes, naming the first difference and both values.
    """
    if world_size == 1:
        return
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, current)
    for rank, other in enumerate(everyone):
        for name, value in everyone[0].items():
            if other[name] != value:
                raise MisconfigurationException(
                    f"All processes expected the same {name}, but got {_short(value)} on process 0 and "
                    f"{_short(other[name])} on process {rank}. Start all with the same command and data."
                )


def gather_shards(states: dict[int, dict[str, Any]], world_size: int) -> dict[int, dict[str, Any]]:
    """Bring the shards of all processes to the first one, which writes the checkpoint; others get their own back."""
    if world_size == 1:
        return states
    everyone: list[Any] | None = [None] * world_size if dist.get_rank() == 0 else None
    dist.gather_object(states, everyone, dst=0)
    return {shard: state for part in everyone for shard, state in part.items()} if everyone else states


def set_position(trainer: Trainer, position: int) -> None:
    """Tell Lightning's loop how many of this process's batches of the epoch are done.

    Its own count is that of the process that wrote the checkpoint, in a run of perhaps other processes. What a
    checkpoint leaves open (it may be written before its batch counts as completed) stays open.
    """
    current = trainer.fit_loop.epoch_loop.batch_progress.current
    shift = position - current.ready
    for name in ("ready", "started", "processed", "completed"):
        setattr(current, name, getattr(current, name) + shift)


def count_waiting_step(trainer: Trainer, batch_idx: int) -> None:
    """Let a process that waits count the steps that others take: ``global_step`` must be one number in a run.

    Callbacks save and log by it, and saving takes part on every process.
    """
    if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
        step = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        step.increment_ready()
        step.increment_completed()


def _short(value: object, length: int = 80) -> str:
    text = str(list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value)
    return text if len(text) <= length else text[:length] + "…"
