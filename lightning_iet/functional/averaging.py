"""Weighted averages of shard models, on one process and over many."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# 32 Ki elements (128 KiB in float32) stay in a core's cache while K tensors are folded into them, and are the most that
# torch gives to one thread: no time is lost in waking others, and an element meets the same instructions whatever the
# number of threads. The work is bound by memory, not by cores.
LOCAL_CHUNK = 1 << 15
"""Elements that are folded at a time within a process."""
# Over the network a message must be larger to be worth its latency, and yet small enough to stay in the cache between
# its arrival and its folding; a multiple, so that pieces are cut alike.
NETWORK_CHUNK = 1 << 19
"""Elements of a message between two processes."""
_WINDOW = 4  # messages under way between two ranks: enough to keep the link busy while one is folded


def fold_weights(sizes: Sequence[float]) -> list[float]:
    r"""Return the weights of a running mean that ends in :math:`\sum_k (n_k / n)\, x_k`.

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
    r"""Average K tensors, :math:`\sum_k (n_k / n)\, x_k` (IET, https://arxiv.org/abs/2407.15328, Algorithm 1).

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
    tensors: Sequence[Tensor],
    sizes: Sequence[float],
    *,
    into: Sequence[Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    squared_distances: Tensor | None = None,
) -> None:
    r"""Replace every tensor by the average of all, in place; over the processes of ``group`` when one is given.

    Each process passes the tensors of the shards that it hosts: a block of neighbours, in rank order. The average is a
    running mean over the shards **in shard order**: rank 0 folds its tensors and sends the partial mean to rank 1,
    which folds its own, and so on; the last rank holds the average and sends it back down. Chunks move up and down the
    ranks like a pipeline, so all links work at once, and a process sends :math:`2\,(W-1)/W` times the bytes of one
    tensor on average, as an all-reduce does. What an all-reduce cannot promise is the order of additions; with it
    fixed, 1, 2 and K processes end in the same bits.

    Args:
        tensors: One flat floating tensor ``(n,)`` per hosted shard.
        sizes: Weight of **every** shard of the run, > 0; ``len(sizes) == len(tensors) * W``.
        into: Where the average goes; ``None`` = into the tensors. Others are then left as they are.
        group: Process group of W processes; ``None`` = this process has all shards.
        squared_distances: Shape ``(len(tensors),)``: to each, the squared distance of a tensor from the average
            is added. ``None`` = not measured, which spares a pass over the tensors.

    Raises:
        ValueError: If the number of sizes does not match, or the tensors are not flat.

    Example:
        >>> a, b = torch.zeros(3), torch.full((3,), 4.0)
        >>> average_([a, b], sizes=[3, 1])
        >>> a, b
        (tensor([1., 1., 1.]), tensor([1., 1., 1.]))
    """
    world, rank = (dist.get_world_size(group), dist.get_rank(group)) if group is not None else (1, 0)
    if len(sizes) != len(tensors) * world:
        raise ValueError(
            f"Argument `sizes` expected {len(tensors)} shards on each of {world} processes, but got {len(sizes)} sizes."
        )
    if any(tensor.ndim != 1 for tensor in tensors):
        raise ValueError(
            f"Argument `tensors` expected flat tensors, but got shapes {[tuple(t.shape) for t in tensors]}."
        )
    weights = fold_weights(sizes)[rank * len(tensors) : (rank + 1) * len(tensors)]
    targets = tensors if into is None else into
    if group is not None and world > 1:
        exchange = _exchange_asynchronously if dist.get_backend(group) == "gloo" else _exchange_in_slots
        exchange(PartialMeans(tensors, weights, targets, group, squared_distances=squared_distances))
        return
    in_place = into is None and squared_distances is None
    for part in _parts(tensors[0]):
        pieces = [tensor[part] for tensor in tensors]
        mean = _fold(None, pieces, weights, in_place=in_place)
        _store(mean, pieces, [target[part] for target in targets], squared_distances)


def _parts(tensor: Tensor) -> list[slice]:
    """Cut a flat tensor into pieces to fold one after the other; one piece on a GPU, whose cache is no matter here."""
    length = tensor.numel()
    size = LOCAL_CHUNK if tensor.device.type == "cpu" else max(length, 1)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _fold(
    mean: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], *, in_place: bool = False
) -> Tensor:
    r"""Fold tensors into a running mean, in place: :math:`a \leftarrow a + w_k (x_k - a)`, in float32 at least.

    Without a mean the first tensor starts it, and becomes it ``in_place``.
    """
    dtype = _accumulator(tensors[0].dtype)
    if mean is None:
        mean = tensors[0] if in_place and tensors[0].dtype == dtype else tensors[0].to(dtype, copy=True)
        tensors, weights = tensors[1:], weights[1:]
    for tensor, weight in zip(tensors, weights, strict=True):
        mean.lerp_(tensor.to(mean.device, dtype), weight)
    return mean


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """Half-precision weights are averaged in float32: K roundings to 8 bits would show."""
    return torch.promote_types(dtype, torch.float32)


def _store(
    mean: Tensor, tensors: Sequence[Tensor], targets: Sequence[Tensor], squared_distances: Tensor | None
) -> None:
    """Write a finished mean to every target, and before that add the squared distance of each tensor from it."""
    if squared_distances is not None:
        apart = torch.stack([torch.linalg.vector_norm(tensor.to(mean.device, mean.dtype) - mean) for tensor in tensors])
        squared_distances += apart.to(squared_distances).square()
    for target in targets:
        if target.data_ptr() != mean.data_ptr():
            target.copy_(mean)


class PartialMeans:
    """One process's part in an average over processes: what it does with each chunk of the partial means.

    Rank 0 starts the mean of a chunk with its tensors, every other rank folds its own into what comes from the rank
    below, and the last one has the average, which goes back down. The functions behind this class move the chunks.

    Args:
        tensors: One flat tensor ``(n,)`` for each shard of this process. If they are the targets, they change in place.
        weights: Of these shards, from :func:`fold_weights`.
        targets: Where the average goes.
        group: The processes.
        squared_distances: As :func:`average_`.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        weights: Sequence[float],
        targets: Sequence[Tensor],
        group: dist.ProcessGroup,
        *,
        squared_distances: Tensor | None = None,
    ) -> None:
        self.tensors, self.weights, self.targets, self.group = tensors, weights, targets, group
        self.squared_distances = squared_distances
        self.rank, self.top = dist.get_rank(group), dist.get_world_size(group) - 1
        length = tensors[0].numel()
        self.chunks = [slice(at, min(at + NETWORK_CHUNK, length)) for at in range(0, length, NETWORK_CHUNK)]
        self.dtype = _accumulator(tensors[0].dtype)
        # gloo sends from host memory, others from the accelerator, wherever the tensors are kept.
        self.device = torch.device("cpu") if dist.get_backend(group) == "gloo" else tensors[0].device
        if dist.get_backend(group) != "gloo" and self.device.type == "cpu":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._free: list[Tensor] = []
        self._lent: dict[int, Tensor] = {}

    def start(self, number: int) -> Tensor:
        """Return rank 0's partial mean of a chunk."""
        first = self.tensors[0][self.chunks[number]]
        if len(self.tensors) == 1 and first.dtype == self.dtype and first.device == self.device:
            return first  # only sent, never changed
        # Distances need the first tensor as it was.
        in_place = self.targets is self.tensors and self.squared_distances is None and first.device == self.device
        mean = _fold(None, [first], self.weights[:1], in_place=in_place).to(self.device)
        return self._folded(mean, number, self.tensors[1:], self.weights[1:])

    def fold(self, mean: Tensor, number: int) -> Tensor:
        """Fold this process's tensors into the partial mean of a chunk from the rank below."""
        return self._folded(mean, number, self.tensors, self.weights)

    def _folded(self, mean: Tensor, number: int, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Fold in the same pieces as one process would."""
        tensors = [tensor[self.chunks[number]] for tensor in tensors]
        for part in _parts(mean) if tensors else ():
            _fold(mean[part], [tensor[part] for tensor in tensors], weights)
        return mean

    def finish(self, mean: Tensor, number: int) -> Tensor:
        """On the last rank: fold this process's tensors in, and keep the average."""
        target = self.targets[0][self.chunks[number]]
        if self.squared_distances is not None or not self._fits(target):
            return self.keep(self.fold(mean, number), number)
        # The last tensor is folded straight into the target, which may be that tensor: one pass over memory less.
        mean = self._folded(mean, number, self.tensors[:-1], self.weights[:-1])
        last = self.tensors[-1][self.chunks[number]].to(self.device, self.dtype)
        for part in _parts(mean):
            torch.lerp(mean[part], last[part], self.weights[-1], out=target[part])
        self.release(mean)
        return self.keep(target, number)

    def keep(self, mean: Tensor, number: int) -> Tensor:
        """Store the average of a chunk, and return it in memory that stays as it is."""
        chunk = self.chunks[number]
        tensors, targets = ([tensor[chunk] for tensor in group] for group in (self.tensors, self.targets))
        _store(mean, tensors, targets, self.squared_distances)
        if not self._fits(targets[0]):
            return mean
        self.release(mean)
        return targets[0]

    def buffer(self, number: int) -> Tensor:
        """Return memory for a chunk from another rank, used again and again: fresh pages cost more than a copy."""
        chunk = self.chunks[number]
        whole = self._free.pop() if self._free else torch.empty(NETWORK_CHUNK, dtype=self.dtype, device=self.device)
        self._lent[whole.data_ptr()] = whole
        return whole[: chunk.stop - chunk.start]

    def release(self, tensor: Tensor) -> None:
        """Take a buffer back that is no longer needed; anything else is left alone."""
        if tensor.data_ptr() in self._lent:
            self._free.append(self._lent.pop(tensor.data_ptr()))

    def place(self, number: int) -> Tensor:
        """Return memory for a chunk of the average: straight in its target, if that can be."""
        target = self.targets[0][self.chunks[number]]
        return target if self._fits(target) and self.squared_distances is None else self.buffer(number)

    def _fits(self, target: Tensor) -> bool:
        return target.dtype == self.dtype and target.device == self.device


# --- gloo: messages are independent of each other ---------------------------------------------------------------------


def _exchange_asynchronously(means: PartialMeans) -> None:
    """Post receives ahead, send as soon as a chunk is ready, and wait for nothing else.

    A rank looks at what comes down `lag` chunks after it sent them up. The lag shrinks from rank to rank, so that no
    rank waits for a chunk which another holds back.
    """
    rank, top, count = means.rank, means.top, len(means.chunks)
    lag = 2 * _WINDOW * (top - rank)
    below = _Inbox(means, rank - 1, means.buffer) if rank > 0 else None
    above = _Inbox(means, rank + 1, means.place) if rank < top else None
    sent = _Outbox(means)
    for step in range(count + lag):
        if step < count:
            if below is not None:
                below.post(up_to=step + _WINDOW)
            if above is None:
                assert below is not None  # noqa: S101 (two ranks at least)
                sent.post(means.finish(below.take(), step), rank - 1, step)
            else:
                mean = means.start(step) if below is None else means.fold(below.take(), step)
                sent.post(mean, rank + 1, step)
        if above is not None and _WINDOW <= step < count + _WINDOW:
            # Once a chunk is on its way up, its memory may take in the average.
            sent.finish(rank + 1, step - _WINDOW)
            above.post(up_to=step - _WINDOW)
        if above is not None and step >= lag:
            average = means.keep(above.take(), step - lag)
            if rank > 0:
                sent.post(average, rank - 1, step - lag)
            else:
                means.release(average)
    sent.finish_all()


class _Inbox:
    """Chunks that come from a neighbour, in order."""

    def __init__(self, means: PartialMeans, peer: int, memory: Callable[[int], Tensor]) -> None:
        self.means, self.memory = means, memory
        self.peer = dist.get_global_rank(means.group, peer)
        self.posted: deque[tuple[Any, Tensor]] = deque()
        self.next = 0

    def post(self, *, up_to: int) -> None:
        """Be ready to receive chunks, up to one of that number."""
        while self.next <= min(up_to, len(self.means.chunks) - 1):
            memory = self.memory(self.next)
            self.posted.append((dist.irecv(memory, self.peer, group=self.means.group), memory))
            self.next += 1

    def take(self) -> Tensor:
        """Wait for the next chunk."""
        work, memory = self.posted.popleft()
        work.wait()
        return memory


class _Outbox:
    """Chunks on their way to neighbours; a Work may be waited for only once, and its memory must live until then."""

    def __init__(self, means: PartialMeans) -> None:
        self.means = means
        self.posted: dict[tuple[int, int], tuple[Any, Tensor]] = {}

    def post(self, tensor: Tensor, peer: int, number: int) -> None:
        """Start to send a chunk."""
        work = dist.isend(tensor, dist.get_global_rank(self.means.group, peer), group=self.means.group)
        self.posted[peer, number] = work, tensor
        if (peer, number - 2 * _WINDOW) in self.posted:
            self.finish(peer, number - 2 * _WINDOW)

    def finish(self, peer: int, number: int) -> None:
        """Wait until a chunk is on its way."""
        work, tensor = self.posted.pop((peer, number))
        work.wait()
        self.means.release(tensor)

    def finish_all(self) -> None:
        """Wait for all chunks."""
        for peer, number in list(self.posted):
            self.finish(peer, number)


# --- NCCL and others: a message and its receipt must be issued together ----------------------------------------------


class _Exchange(NamedTuple):
    """One message between neighbours."""

    sends: bool
    tensor: Tensor
    peer: int
    chunk: int


def _exchange_in_slots(means: PartialMeans) -> None:
    """All ranks in step: in slot s, a rank exchanges one chunk with each neighbour, both ways.

    While these travel, it works on those that came in slot s - 1. So a chunk takes two slots from rank to rank, and all
    links are busy at once. A message is sent and received in the same slot, which is what lets NCCL pair the two.
    """
    up: dict[int, Tensor] = {}
    down: dict[int, Tensor] = {}
    arrived: list[_Exchange] = []
    for slot in range(len(means.chunks) + 4 * means.top):
        if means.rank == 0 and slot < len(means.chunks):
            up[slot] = means.start(slot)
        exchanges = _exchanges(means, slot, up, down)
        works = _start(means, exchanges)
        for exchange in arrived:
            _receive(means, exchange, up, down)
        for work in works:
            work.wait()
        for exchange in exchanges:
            if exchange.sends:
                means.release(exchange.tensor)
        arrived = [exchange for exchange in exchanges if not exchange.sends]


def _exchanges(means: PartialMeans, slot: int, up: dict[int, Tensor], down: dict[int, Tensor]) -> list[_Exchange]:
    """The messages of a slot: chunk c goes up from rank r in slot c + 2 r, and down in slot c + 2 (2 top - r)."""
    rank, top, chunks = means.rank, means.top, range(len(means.chunks))
    messages = []
    if rank < top:
        going, coming = slot - 2 * rank, slot - 2 * (2 * top - rank - 1)
        if going in chunks:
            messages.append(_Exchange(True, up.pop(going), rank + 1, going))
        if coming in chunks:
            messages.append(_Exchange(False, means.place(coming), rank + 1, coming))
    if rank > 0:
        going, coming = slot - 2 * (2 * top - rank), slot - 2 * (rank - 1)
        if going in chunks:
            messages.append(_Exchange(True, down.pop(going), rank - 1, going))
        if coming in chunks:
            messages.append(_Exchange(False, means.buffer(coming), rank - 1, coming))
    return messages


def _receive(means: PartialMeans, exchange: _Exchange, up: dict[int, Tensor], down: dict[int, Tensor]) -> None:
    """Fold a partial mean that came from below, or keep an average that came from above."""
    mean, number = exchange.tensor, exchange.chunk
    if exchange.peer < means.rank:
        if means.rank < means.top:
            up[number] = means.fold(mean, number)
            return
        average = means.finish(mean, number)
    else:
        average = means.keep(mean, number)
    if means.rank > 0:
        down[number] = average
    else:
        means.release(average)


def _start(means: PartialMeans, exchanges: list[_Exchange]) -> list[dist.Work]:
    operations = [
        dist.P2POp(
            dist.isend if exchange.sends else dist.irecv,
            exchange.tensor,
            dist.get_global_rank(means.group, exchange.peer),
            means.group,
        )
        for exchange in exchanges
    ]
    return dist.batch_isend_irecv(operations) if operations else []
