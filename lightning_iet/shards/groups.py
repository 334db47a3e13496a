"""The processes of a run: which of them train one shard together, and what all of them must agree on."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_iet.functional.sharding import num_replicas

T = TypeVar("T")


@dataclass(frozen=True)
class ShardGroups:
    """The process groups of one process."""

    across: dist.ProcessGroup | None = None
    """Processes that together host every shard once: they average. None = this process hosts all."""
    within: dist.ProcessGroup | None = None
    """Replicas of this process's shard: they average gradients, as ordinary DDP does. None = there are none."""
    replica: int = 0
    """Which of the replicas this process is."""


def make_groups(
    num_shards: int, world_size: int, rank: int, *, device_type: str, timeout: timedelta | None = None
) -> ShardGroups:
    """Arrange the processes in a mesh with the axes ``shard`` and ``replica``; neighbouring ranks are replicas.

    Neighbours usually share a machine, and gradients are exchanged in every step. To be called on every process of the
    run.

    Args:
        num_shards: Number of shards, K.
        world_size: Number of processes, W = n · K for n replicas, or a divisor of K.
        rank: This process.
        device_type: ``"cpu"`` or ``"cuda"``.
        timeout: How long a process waits for another one; ``None`` = torch's default.
    """
    if world_size == 1:
        return ShardGroups()
    replicas = num_replicas(num_shards, world_size)
    if replicas == 1:
        return ShardGroups(across=dist.group.WORLD)
    ranks = torch.arange(world_size).view(num_shards, replicas)
    # Groups that a mesh makes itself have torch's timeout, whatever the run's is.
    across, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=timeout)
    within, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
    assert isinstance(across, dist.ProcessGroup)  # noqa: S101
    assert isinstance(within, dist.ProcessGroup)  # noqa: S101
    mesh = DeviceMesh.from_group([across, within], device_type, mesh=ranks, mesh_dim_names=("shard", "replica"))
    return ShardGroups(mesh.get_group("shard"), mesh.get_group("replica"), rank % replicas)


def gather_rows(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Interleave the rows of all processes of a group: each one's first, each one's second … A collective.

    That is the order in which :func:`~lightning_iet.functional.sharding.replica_part` has dealt the samples out: of W
    processes with shape ``(B, …)`` each, the result has ``(B · W, …)``, no graph, and ``[r::W]`` are those of rank r.
    """
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return torch.stack(parts, 1).flatten(0, 1)


@torch.no_grad()
def broadcast_model(module: nn.Module) -> None:
    """Give all processes of the run the parameters and buffers of the first one. A collective."""
    for tensor in (*module.parameters(), *module.buffers()):
        whole = tensor.data.contiguous()
        dist.broadcast(whole, src=0)
        tensor.data.copy_(whole)


def gather_objects(value: T, world_size: int) -> list[T]:
    """Return the values of all processes of the run, by rank. A collective for more than one process."""
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def gather_shards(states: dict[int, dict[str, Any]], world_size: int) -> dict[int, dict[str, Any]]:
    """Return the shards of all processes on the first one, which writes the checkpoint; elsewhere, the own ones."""
    if world_size == 1:
        return states
    if dist.get_rank() > 0:
        written = io.BytesIO()
        torch.save(states, written)  # at once: what pickles objects saves every tensor by itself
        dist.gather_object(written.getvalue(), dst=0)
        return states
    parts: list[Any] = [None] * world_size
    dist.gather_object(b"", parts, dst=0)
    others = [torch.load(io.BytesIO(part), map_location="cpu", weights_only=False) for part in parts[1:]]
    return {shard: state for part in (states, *others) for shard, state in part.items()}


def check_same_everywhere(values: Mapping[str, Any], world_size: int, *, remedy: str) -> None:
    """Refuse processes that disagree about the run they are part of. A collective for more than one process.

    Raises:
        MisconfigurationException: On all processes, naming the first of the readable names whose values differ, both
            values, and the remedy, one sentence.
    """
    first, *others = gather_objects(values, world_size)
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise MisconfigurationException(
                    f"All processes expected the same {name}, but got {shortened(value)} on process 0 and "
                    f"{shortened(other[name])} on process {rank}. {remedy}"
                )


def shortened(value: object, length: int = 80) -> str:
    """Write a value into an error message: strings as a whole, everything else cut to ``length`` characters."""
    if isinstance(value, str):
        return value
    text = str(list(value) if isinstance(value, Sequence) else value)
    return text if len(text) <= length else text[:length] + "…"
