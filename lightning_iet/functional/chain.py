"""A running mean over shards, folded piece by piece, and passed along a chain of processes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["LOCAL_CHUNK", "NETWORK_CHUNK", "Chain", "fold", "parts", "write"]

# 32 Ki elements (128 KiB in float32) stay in a core's cache while K copies are folded into them, and are the most that
# torch gives to one thread: no time is lost in waking others, and an element meets the same instructions whatever the
# number of threads. The work is bound by memory, not by cores.
LOCAL_CHUNK = 1 << 15
# Over the network a message must be larger to be worth its latency; a multiple, so that pieces are cut alike.
NETWORK_CHUNK = 1 << 20


def parts(tensor: Tensor) -> list[slice]:
    """Pieces of a flat tensor to fold one after the other; one piece on a GPU, whose cache is no matter here."""
    length = tensor.numel()
    size = LOCAL_CHUNK if tensor.device.type == "cpu" else max(length, 1)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def fold(mean: Tensor | None, copies: Sequence[Tensor], weights: Sequence[float], *, in_place: bool = False) -> Tensor:
    r"""Fold copies into a running mean, in place: :math:`a \leftarrow a + w_k (x_k - a)`.

    Args:
        mean: Where the mean stands; ``None`` = the first copy starts it.
        copies: Tensors of one shape.
        weights: Of each, from :func:`~lightning_iet.functional.averaging.fold_weights`.
        in_place: Whether the first copy may become the mean.

    Returns:
        The mean, in float32 at least.
    """
    dtype = accumulator(copies[0].dtype)
    if mean is None:
        mean = copies[0] if in_place and copies[0].dtype == dtype else copies[0].to(dtype, copy=True)
        copies, weights = copies[1:], weights[1:]
    for copy, weight in zip(copies, weights, strict=True):
        mean.lerp_(copy.to(dtype), weight)
    return mean


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Half-precision weights are averaged in float32: K roundings to 8 bits would show."""
    return torch.promote_types(dtype, torch.float32)


def write(mean: Tensor, targets: Sequence[Tensor]) -> None:
    """Copy a mean to every target that is not the mean itself."""
    for target in targets:
        if target.data_ptr() != mean.data_ptr():
            target.copy_(mean)


class _Exchange(NamedTuple):
    """One message between neighbours."""

    sends: bool
    tensor: Tensor
    peer: int
    chunk: int


class Chain:
    """The average over processes: partial means go up the ranks chunk by chunk, averages come back down.

    In slot s, a rank exchanges one chunk with each neighbour, both ways; while these travel, it works on those that
    came in slot s - 1. So a chunk takes two slots from rank to rank, and all links are busy at once. A message is sent
    and received in the same slot, which is what lets NCCL pair the two.

    Args:
        copies: One flat tensor ``(n,)`` for each shard of this process. If they are the targets, they change in place.
        weights: Of these shards, from :func:`~lightning_iet.functional.averaging.fold_weights`.
        targets: Where the average goes.
        group: The processes.
    """

    def __init__(
        self, copies: Sequence[Tensor], weights: Sequence[float], targets: Sequence[Tensor], group: dist.ProcessGroup
    ) -> None:
        self.copies, self.weights, self.targets, self.group = copies, weights, targets, group
        self.rank, self.top = dist.get_rank(group), dist.get_world_size(group) - 1
        length = copies[0].numel()
        self.chunks = [slice(at, min(at + NETWORK_CHUNK, length)) for at in range(0, length, NETWORK_CHUNK)]
        self.dtype = accumulator(copies[0].dtype)
        self.up: dict[int, Tensor] = {}
        self.down: dict[int, Tensor] = {}

    def run(self) -> None:
        """Average; returns when this process has all of it."""
        arrived: list[_Exchange] = []
        for slot in range(len(self.chunks) + 4 * self.top):
            if self.rank == 0 and slot < len(self.chunks):
                self.up[slot] = self._fold(None, slot)
            exchanges = self._exchanges(slot)
            works = self._start(exchanges)
            for exchange in arrived:
                self._receive(exchange)
            for work in works:
                work.wait()
            arrived = [exchange for exchange in exchanges if not exchange.sends]

    def _exchanges(self, slot: int) -> list[_Exchange]:
        """The messages of a slot: chunk c goes up from rank r in slot c + 2 r, and down in slot c + 2 (2 top - r)."""
        rank, top = self.rank, self.top
        messages = []
        if rank < top:
            going, coming = slot - 2 * rank, slot - 2 * (2 * top - rank - 1)
            if going in range(len(self.chunks)):
                messages.append(_Exchange(True, self.up.pop(going), rank + 1, going))
            if coming in range(len(self.chunks)):
                messages.append(_Exchange(False, self._place(coming), rank + 1, coming))
        if rank > 0:
            going, coming = slot - 2 * (2 * top - rank), slot - 2 * (rank - 1)
            if going in range(len(self.chunks)):
                messages.append(_Exchange(True, self.down.pop(going), rank - 1, going))
            if coming in range(len(self.chunks)):
                messages.append(_Exchange(False, self._buffer(coming), rank - 1, coming))
        return messages

    def _receive(self, exchange: _Exchange) -> None:
        """Fold a partial mean that came from below, or keep an average that came from above."""
        mean, number = exchange.tensor, exchange.chunk
        if exchange.peer < self.rank:
            mean = self._fold(mean, number)
            if self.rank < self.top:
                self.up[number] = mean
                return
        write(mean, [target[self.chunks[number]] for target in self.targets])
        if self.rank > 0:
            self.down[number] = mean

    def _fold(self, mean: Tensor | None, number: int) -> Tensor:
        """Fold this process's copies of a chunk, in the same pieces as one process would."""
        copies, weights = [copy[self.chunks[number]] for copy in self.copies], self.weights
        if mean is None:
            # A single copy is only sent, never changed.
            in_place = self.targets is self.copies or len(copies) == 1
            mean = fold(None, copies[:1], weights[:1], in_place=in_place)
            copies, weights = copies[1:], weights[1:]
        for part in parts(mean) if copies else ():
            fold(mean[part], [copy[part] for copy in copies], weights)
        return mean

    def _buffer(self, number: int) -> Tensor:
        return torch.empty_like(self.copies[0][self.chunks[number]], dtype=self.dtype)

    def _place(self, number: int) -> Tensor:
        """Where an average from above is received: straight in its target, if the dtype allows."""
        target = self.targets[0][self.chunks[number]]
        return target if target.dtype == self.dtype else self._buffer(number)

    def _start(self, exchanges: Sequence[_Exchange]) -> list[dist.Work]:
        operations = [
            dist.P2POp(
                dist.isend if exchange.sends else dist.irecv,
                exchange.tensor,
                dist.get_global_rank(self.group, exchange.peer),
                self.group,
            )
            for exchange in exchanges
        ]
        return dist.batch_isend_irecv(operations) if operations else []
