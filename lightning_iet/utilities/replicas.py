"""Processes that train one model together."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["broadcast_model", "gather_rows"]


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
