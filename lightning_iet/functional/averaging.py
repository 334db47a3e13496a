"""The average of shard models, in one process or over many, with the same bits."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_iet.functional.chain import Chain, fold, parts, settle
from lightning_iet.functional.relay import relay

__all__ = ["average_", "fold_weights", "weighted_average"]


def fold_weights(sizes: Sequence[float]) -> list[float]:
    r"""Weights of a running mean that ends in :math:`\sum_k (n_k / n)\, x_k`.

    :math:`a_0 = x_0,\; a_k = a_{k-1} + \frac{n_k}{n_0 + … + n_k} (x_k - a_{k-1})`.

    Args:
        sizes: Weight of each shard, usually its number of samples; all > 0.

    Raises:
        ValueError: If there is no shard or a weight is not positive.

    Example:
        >>> fold_weights([1, 1, 2])
        [1.0, 0.5, 0.5]
    """
    if not sizes or min(sizes) <= 0:
        raise ValueError(f"Argument `sizes` expected one number > 0 per shard, but got {list(sizes)}.")
    total = 0.0
    weights = []
    for size in sizes:
        total += size
        weights.append(size / total)
    return weights


def weighted_average(tensors: Sequence[Tensor], sizes: Sequence[float]) -> Tensor:
    r"""Average of K tensors, :math:`\sum_k (n_k / n)\, x_k` (IET, https://arxiv.org/abs/2407.15328, Algorithm 1).

    Computed as a running mean: identical tensors average to themselves bit for bit, and the order of additions is
    fixed, so that the result does not depend on how many processes share the work.

    Args:
        tensors: K floating tensors of one shape.
        sizes: Weight of each, > 0.

    Returns:
        A new tensor of that shape and dtype.

    Example:
        >>> weighted_average([torch.tensor([0.0, 1.0]), torch.tensor([3.0, 1.0])], sizes=[2, 1])
        tensor([1., 1.])
    """
    result = torch.empty_like(tensors[0]).reshape(-1)
    average_([tensor.reshape(-1) for tensor in tensors], sizes, into=[result])
    return result.view_as(tensors[0])


@torch.no_grad()
def average_(
    copies: Sequence[Tensor],
    sizes: Sequence[float],
    *,
    into: Sequence[Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    squared_distances: Tensor | None = None,
) -> None:
    r"""Replace every copy by the average of all, in place; over the processes of ``group`` when one is given.

    Each process passes the copies of the shards that it hosts: a block of neighbours, in rank order. The average is a
    running mean over the shards **in shard order**: rank 0 folds its copies and passes the partial mean to rank 1,
    which folds its own, and so on; the last rank holds the average and passes it back down. Chunks move through that
    chain like a pipeline, so all links work at once, and a process sends :math:`2\,(W-1)/W` times the bytes of one
    copy on average, as an all-reduce does. What an all-reduce cannot promise is the order of additions; with it fixed,
    1, 2 and K processes end in the same bits.

    Args:
        copies: One flat floating tensor ``(n,)`` per hosted shard.
        sizes: Weight of **every** shard of the run, > 0; ``len(sizes) == len(copies) * W``.
        into: Where the average goes; ``None`` = into the copies. Others are then left as they are.
        group: Process group of W processes; ``None`` = this process has all shards.
        squared_distances: Shape ``(len(copies),)``: to each, the squared distance of a copy from the average
            is added. ``None`` = not measured, which spares a pass over the copies.

    Raises:
        ValueError: If the number of sizes does not match, or the copies are not flat.

    Example:
        >>> a, b = torch.zeros(3), torch.full((3,), 4.0)
        >>> average_([a, b], sizes=[3, 1])
        >>> a, b
        (tensor([1., 1., 1.]), tensor([1., 1., 1.]))
    """
    world, rank = (dist.get_world_size(group), dist.get_rank(group)) if group is not None else (1, 0)
    if len(sizes) != len(copies) * world:
        raise ValueError(
            f"Argument `sizes` expected {len(copies)} shards on each of {world} processes, but got {len(sizes)} sizes."
        )
    if any(copy.ndim != 1 for copy in copies):
        raise ValueError(f"Argument `copies` expected flat tensors, but got shapes {[tuple(c.shape) for c in copies]}.")
    weights = fold_weights(sizes)[rank * len(copies) : (rank + 1) * len(copies)]
    targets = copies if into is None else into
    if group is None or world == 1:
        in_place = into is None and squared_distances is None
        for part in parts(copies[0]):
            pieces = [copy[part] for copy in copies]
            mean = fold(None, pieces, weights, in_place=in_place)
            settle(mean, pieces, [target[part] for target in targets], squared_distances)
    else:
        relay(Chain(copies, weights, targets, group, squared_distances=squared_distances))
