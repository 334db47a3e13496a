"""The average of shard models, in one process or over many, with the same bits."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["average_", "fold_weights", "weighted_average"]

# 64 Ki elements (256 KiB in float32) stay in a core's cache while K copies are folded into them. Over the network a
# message must be larger than that to be worth its latency.
LOCAL_CHUNK = 1 << 16
NETWORK_CHUNK = 1 << 20


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
        for part in _chunks(copies[0].numel(), LOCAL_CHUNK):
            mean = _fold(None, [copy[part] for copy in copies], weights)
            _write([target[part] for target in targets], mean)
    else:
        _average_in_chain(copies, weights, targets, group)


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _fold(mean: Tensor | None, copies: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Fold copies into a running mean (``None`` = the first copy starts it)."""
    # Half-precision weights are averaged in float32: K roundings of 8 bits would show.
    dtype = torch.promote_types(copies[0].dtype, torch.float32)
    if mean is None:
        mean, copies, weights = copies[0].to(dtype, copy=True), copies[1:], weights[1:]
    difference = torch.empty_like(mean)
    for copy, weight in zip(copies, weights, strict=True):
        # Three plainly rounded operations instead of one `lerp_`: whether that fuses depends on an element's place in
        # the vector registers, and so on chunk and thread counts.
        torch.sub(copy.to(dtype), mean, out=difference)
        mean.add_(difference.mul_(weight))
    return mean


def _write(targets: Sequence[Tensor], mean: Tensor) -> None:
    for target in targets:
        target.copy_(mean)


def _average_in_chain(
    copies: Sequence[Tensor], weights: Sequence[float], targets: Sequence[Tensor], group: dist.ProcessGroup
) -> None:
    """The pipeline of :func:`average_`. In one slot every rank exchanges one chunk with each neighbour, both ways."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    chunks = _chunks(copies[0].numel(), NETWORK_CHUNK)
    dtype = torch.promote_types(copies[0].dtype, torch.float32)
    folded: dict[int, Tensor] = {}  # partial means on their way up
    ready: dict[int, Tensor] = {}  # averages on their way down
    for slot in range(len(chunks) + 2 * world - 2):
        # The same chunk meets sender and receiver in the same slot, which is what lets NCCL pair them.
        up, came_up = slot - rank, slot - rank + 1
        down, came_down = slot - (2 * world - 2 - rank), slot - (2 * world - 3 - rank)
        if rank == 0 and up < len(chunks):
            folded[up] = _fold(None, [copy[chunks[up]] for copy in copies], weights)
        operations, received = [], {}
        for index, peer, source in ((up, rank + 1, folded), (down, rank - 1, ready)):
            if 0 <= index < len(chunks) and 0 <= peer < world:
                operations.append(_operation(dist.isend, source.pop(index), peer, group))
        for index, peer in ((came_up, rank - 1), (came_down, rank + 1)):
            if 0 <= index < len(chunks) and 0 <= peer < world:
                received[peer] = torch.empty_like(copies[0][chunks[index]], dtype=dtype)
                operations.append(_operation(dist.irecv, received[peer], peer, group))
        _wait(operations)
        if rank - 1 in received:
            mean = _fold(received[rank - 1], [copy[chunks[came_up]] for copy in copies], weights)
            (ready if rank == world - 1 else folded)[came_up] = mean
            if rank == world - 1:
                _write([target[chunks[came_up]] for target in targets], mean)
        if rank + 1 in received:
            _write([target[chunks[came_down]] for target in targets], received[rank + 1])
            ready[came_down] = received[rank + 1]


def _operation(kind: object, tensor: Tensor, peer: int, group: dist.ProcessGroup) -> dist.P2POp:
    return dist.P2POp(kind, tensor, dist.get_global_rank(group, peer), group)  # type: ignore[arg-type]


def _wait(operations: Sequence[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(list(operations)) if operations else ():
        work.wait()
