"""A running mean over shards, folded piece by piece, and what one process of a chain does with each piece."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["LOCAL_CHUNK", "NETWORK_CHUNK", "Chain", "accumulator", "fold", "parts", "settle"]

# 32 Ki elements (128 KiB in float32) stay in a core's cache while K copies are folded into them, and are the most that
# torch gives to one thread: no time is lost in waking others, and an element meets the same instructions whatever the
# number of threads. The work is bound by memory, not by cores.
LOCAL_CHUNK = 1 << 15
"""Elements that are folded at a time within a process."""
# Over the network a message must be larger to be worth its latency, and yet small enough to stay in the cache between
# its arrival and its folding; a multiple, so that pieces are cut alike.
NETWORK_CHUNK = 1 << 19
"""Elements of a message between two processes."""


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
        mean.lerp_(copy.to(mean.device, dtype), weight)
    return mean


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Half-precision weights are averaged in float32: K roundings to 8 bits would show."""
    return torch.promote_types(dtype, torch.float32)


def settle(
    mean: Tensor, copies: Sequence[Tensor], targets: Sequence[Tensor], squared_distances: Tensor | None = None
) -> None:
    """Write a finished mean to every target, and before that measure how far each copy is from it.

    Args:
        mean: The average of a piece.
        copies: What was averaged; still untouched if distances are wanted.
        targets: Where the average goes; one may be the mean itself.
        squared_distances: Shape ``(len(copies),)``; each copy's squared distance is added.
    """
    if squared_distances is not None:
        apart = torch.stack([torch.linalg.vector_norm(copy.to(mean.device, mean.dtype) - mean) for copy in copies])
        squared_distances += apart.to(squared_distances).square()
    for target in targets:
        if target.data_ptr() != mean.data_ptr():
            target.copy_(mean)


class Chain:
    """One process's part in an average over processes: partial means go up the ranks, averages come back down.

    Rank 0 starts the mean of a chunk with its copies, every other rank folds its own into what comes from below, and
    the last one has the average, which goes back down. This class says what is done with a chunk;
    :mod:`~lightning_iet.functional.relay` moves the chunks.

    Args:
        copies: One flat tensor ``(n,)`` for each shard of this process. If they are the targets, they change in place.
        weights: Of these shards, from :func:`~lightning_iet.functional.averaging.fold_weights`.
        targets: Where the average goes.
        group: The processes.
        squared_distances: See :func:`settle`.
    """

    def __init__(
        self,
        copies: Sequence[Tensor],
        weights: Sequence[float],
        targets: Sequence[Tensor],
        group: dist.ProcessGroup,
        *,
        squared_distances: Tensor | None = None,
    ) -> None:
        self.copies, self.weights, self.targets, self.group = copies, weights, targets, group
        self.squared_distances = squared_distances
        self.rank, self.top = dist.get_rank(group), dist.get_world_size(group) - 1
        length = copies[0].numel()
        self.chunks = [slice(at, min(at + NETWORK_CHUNK, length)) for at in range(0, length, NETWORK_CHUNK)]
        self.dtype = accumulator(copies[0].dtype)
        self.device = _device_of(group, copies[0])
        self._free: list[Tensor] = []
        self._lent: dict[int, Tensor] = {}

    def start(self, number: int) -> Tensor:
        """Rank 0's partial mean of a chunk."""
        first = self.copies[0][self.chunks[number]]
        if len(self.copies) == 1 and first.dtype == self.dtype and first.device == self.device:
            return first  # only sent, never changed
        # Distances need the first copy as it was.
        in_place = self.targets is self.copies and self.squared_distances is None and first.device == self.device
        mean = fold(None, [first], self.weights[:1], in_place=in_place).to(self.device)
        return self._fold(mean, number, self.copies[1:], self.weights[1:])

    def fold(self, mean: Tensor, number: int) -> Tensor:
        """Take this process's copies of a chunk into the partial mean from below."""
        return self._fold(mean, number, self.copies, self.weights)

    def _fold(self, mean: Tensor, number: int, copies: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """In the same pieces as one process would."""
        copies = [copy[self.chunks[number]] for copy in copies]
        for part in parts(mean) if copies else ():
            fold(mean[part], [copy[part] for copy in copies], weights)
        return mean

    def finish(self, mean: Tensor, number: int) -> Tensor:
        """The last rank's turn: fold this process's copies in, and keep the average."""
        targets = [target[self.chunks[number]] for target in self.targets]
        if self.squared_distances is not None or not self._may_lie_in(targets[0]):
            return self.settle(self.fold(mean, number), number)
        # The last copy is folded straight into the target, which may be that copy: one pass over memory less.
        mean = self._fold(mean, number, self.copies[:-1], self.weights[:-1])
        last = self.copies[-1][self.chunks[number]].to(self.device, self.dtype)
        for part in parts(mean):
            torch.lerp(mean[part], last[part], self.weights[-1], out=targets[0][part])
        return self.settle(self._swap(mean, targets[0]), number)

    def settle(self, mean: Tensor, number: int) -> Tensor:
        """Keep the average of a chunk; returns it in memory that stays as it is."""
        chunk = self.chunks[number]
        copies, targets = ([tensor[chunk] for tensor in tensors] for tensors in (self.copies, self.targets))
        settle(mean, copies, targets, self.squared_distances)
        return self._swap(mean, targets[0]) if self._may_lie_in(targets[0]) else mean

    def _swap(self, mean: Tensor, target: Tensor) -> Tensor:
        """Go on with the target in the place of a buffer that holds the same, or is no longer needed."""
        self.give_back(mean)
        return target

    def buffer(self, number: int) -> Tensor:
        """Memory for a chunk that comes from another rank, used again and again: fresh pages cost more than a copy."""
        chunk = self.chunks[number]
        whole = self._free.pop() if self._free else torch.empty(NETWORK_CHUNK, dtype=self.dtype, device=self.device)
        self._lent[whole.data_ptr()] = whole
        return whole[: chunk.stop - chunk.start]

    def give_back(self, tensor: Tensor) -> None:
        """Take a buffer back that is no longer needed; anything else is left alone."""
        if tensor.data_ptr() in self._lent:
            self._free.append(self._lent.pop(tensor.data_ptr()))

    def place(self, number: int) -> Tensor:
        """Memory for a chunk of the average: straight in its target, if that can be."""
        target = self.targets[0][self.chunks[number]]
        return target if self._may_lie_in(target) and self.squared_distances is None else self.buffer(number)

    def _may_lie_in(self, target: Tensor) -> bool:
        return target.dtype == self.dtype and target.device == self.device


def _device_of(group: dist.ProcessGroup, copy: Tensor) -> torch.device:
    """Where messages lie: gloo sends from host memory, others from the accelerator, wherever the copies are kept."""
    if dist.get_backend(group) == "gloo":
        return torch.device("cpu")
    return copy.device if copy.device.type != "cpu" else torch.device("cuda", torch.cuda.current_device())
