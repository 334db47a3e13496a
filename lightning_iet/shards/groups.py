"""Which processes average their shards, and which train one shard together."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lightning_iet.functional.sharding import num_replicas

__all__ = ["ShardGroups", "make_groups"]


@dataclass(frozen=True)
class ShardGroups:
    """The process groups of one process."""

    across: dist.ProcessGroup | None = None
    """Processes that together host every shard once: they average. None = this process hosts all."""
    within: dist.ProcessGroup | None = None
    """Replicas of this process's shard: they average gradients, as ordinary DDP does. None = there are none."""
    replica: int = 0
    """Which of the replicas this process is."""


def make_groups(num_shards: int, world_size: int, rank: int, *, device_type: str) -> ShardGroups:
    """Lay the processes out as a mesh with the axes ``shard`` and ``replica``; neighbouring ranks are replicas.

    Neighbours usually share a machine, and it is the gradients that are exchanged in every step. To be called on every
    process of the run.

    Args:
        num_shards: Number of shards, K.
        world_size: Number of processes, W = n · K for n replicas, or a divisor of K.
        rank: This process.
        device_type: ``"cpu"`` or ``"cuda"``.
    """
    if world_size == 1:
        return ShardGroups()
    replicas = num_replicas(num_shards, world_size)
    if replicas == 1:
        return ShardGroups(across=dist.group.WORLD)
    mesh = init_device_mesh(device_type, (num_shards, replicas), mesh_dim_names=("shard", "replica"))
    return ShardGroups(mesh.get_group("shard"), mesh.get_group("replica"), rank % replicas)
