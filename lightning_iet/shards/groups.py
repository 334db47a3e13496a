"""Processes that train one model together."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_iet.functional.sharding import num_replicas


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
    """Lay the processes out as a mesh with the axes ``shard`` and ``replica``; neighbouring ranks are replicas.

    Neighbours usually share a machine, and it is the gradients that are exchanged in every step. To be called on every
    process of the run.

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
    # A mesh that makes its groups itself gives them torch's timeout, whatever the run's is.
    across, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=timeout)
    within, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
    assert isinstance(across, dist.ProcessGroup)  # noqa: S101
    assert isinstance(within, dist.ProcessGroup)  # noqa: S101
    mesh = DeviceMesh.from_group([across, within], device_type, mesh=ranks, mesh_dim_names=("shard", "replica"))
    return ShardGroups(mesh.get_group("shard"), mesh.get_group("replica"), rank % replicas)


def gather_rows(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all processes of a group, in turn: each one's first, each one's second … Takes part on every process.

    That is the order in which :func:`~lightning_iet.functional.sharding.replica_part` has dealt the samples out.

    Args:
        tensor: Shape ``(B, …)``, the same on every process.
        group: The processes, W.

    Returns:
        Shape ``(B · W, …)``, without a graph; those of rank r are ``[r::W]``.
    """
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return torch.stack(parts, 1).flatten(0, 1)


@torch.no_grad()
def broadcast_model(module: nn.Module) -> None:
    """Give all processes of the run the parameters and buffers of the first one. Takes part on every process."""
    for tensor in (*module.parameters(), *module.buffers()):
        whole = tensor.data.contiguous()
        dist.broadcast(whole, src=0)
        tensor.data.copy_(whole)
