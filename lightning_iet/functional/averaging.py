"""Weighted averages of shard models, on one process and over many."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

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
    :mod:`~lightning_iet.functional.averaging` moves the chunks.

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


# Chunks on the way between two neighbours: enough to keep the link busy while one is folded.
WINDOW = 4


def relay(chain: Chain) -> None:
    """Average over the processes of a chain; returns when this process has all of it."""
    if dist.get_backend(chain.group) == "gloo":
        _stream(chain)
    else:
        _march(chain)


# --- gloo: messages are independent of each other ---------------------------------------------------------------------


def _stream(chain: Chain) -> None:
    """Post receives ahead, send as soon as a chunk is ready, and wait for nothing else.

    A rank looks at what comes down `lag` chunks after it sent them up. The lag shrinks from rank to rank, so that no
    rank waits for a chunk which another holds back.
    """
    rank, top, count = chain.rank, chain.top, len(chain.chunks)
    lag = 2 * WINDOW * (top - rank)
    below = _Inbox(chain, rank - 1, chain.buffer) if rank > 0 else None
    above = _Inbox(chain, rank + 1, chain.place) if rank < top else None
    sent = _Outbox(chain)
    for step in range(count + lag):
        if step < count:
            if below is not None:
                below.post(up_to=step + WINDOW)
            if above is None:
                assert below is not None  # noqa: S101 (a chain has two ranks at least)
                sent.post(chain.finish(below.take(), step), rank - 1, step)
            else:
                mean = chain.start(step) if below is None else chain.fold(below.take(), step)
                sent.post(mean, rank + 1, step)
        if above is not None and WINDOW <= step < count + WINDOW:
            # Once a chunk is on its way up, its memory may take in the average.
            sent.finish(rank + 1, step - WINDOW)
            above.post(up_to=step - WINDOW)
        if above is not None and step >= lag:
            average = chain.settle(above.take(), step - lag)
            if rank > 0:
                sent.post(average, rank - 1, step - lag)
            else:
                chain.give_back(average)
    sent.finish_all()


class _Inbox:
    """Chunks that come from a neighbour, in order."""

    def __init__(self, chain: Chain, peer: int, memory: Callable[[int], Tensor]) -> None:
        self.chain, self.memory = chain, memory
        self.peer = dist.get_global_rank(chain.group, peer)
        self.posted: deque[tuple[Any, Tensor]] = deque()
        self.next = 0

    def post(self, *, up_to: int) -> None:
        """Be ready to receive chunks, up to one of that number."""
        while self.next <= min(up_to, len(self.chain.chunks) - 1):
            memory = self.memory(self.next)
            self.posted.append((dist.irecv(memory, self.peer, group=self.chain.group), memory))
            self.next += 1

    def take(self) -> Tensor:
        """Wait for the next chunk."""
        work, memory = self.posted.popleft()
        work.wait()
        return memory


class _Outbox:
    """Chunks on their way to neighbours; a Work may be waited for only once, and its memory must live until then."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.posted: dict[tuple[int, int], tuple[Any, Tensor]] = {}

    def post(self, tensor: Tensor, peer: int, number: int) -> None:
        """Start to send a chunk."""
        work = dist.isend(tensor, dist.get_global_rank(self.chain.group, peer), group=self.chain.group)
        self.posted[peer, number] = work, tensor
        if (peer, number - 2 * WINDOW) in self.posted:
            self.finish(peer, number - 2 * WINDOW)

    def finish(self, peer: int, number: int) -> None:
        """Wait until a chunk is on its way."""
        work, tensor = self.posted.pop((peer, number))
        work.wait()
        self.chain.give_back(tensor)

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


def _march(chain: Chain) -> None:
    """All ranks in step: in slot s, a rank exchanges one chunk with each neighbour, both ways.

    While these travel, it works on those that came in slot s - 1. So a chunk takes two slots from rank to rank, and all
    links are busy at once. A message is sent and received in the same slot, which is what lets NCCL pair the two.
    """
    up: dict[int, Tensor] = {}
    down: dict[int, Tensor] = {}
    arrived: list[_Exchange] = []
    for slot in range(len(chain.chunks) + 4 * chain.top):
        if chain.rank == 0 and slot < len(chain.chunks):
            up[slot] = chain.start(slot)
        exchanges = _exchanges(chain, slot, up, down)
        works = _start(chain, exchanges)
        for exchange in arrived:
            _receive(chain, exchange, up, down)
        for work in works:
            work.wait()
        for exchange in exchanges:
            if exchange.sends:
                chain.give_back(exchange.tensor)
        arrived = [exchange for exchange in exchanges if not exchange.sends]


def _exchanges(chain: Chain, slot: int, up: dict[int, Tensor], down: dict[int, Tensor]) -> list[_Exchange]:
    """The messages of a slot: chunk c goes up from rank r in slot c + 2 r, and down in slot c + 2 (2 top - r)."""
    rank, top, chunks = chain.rank, chain.top, range(len(chain.chunks))
    messages = []
    if rank < top:
        going, coming = slot - 2 * rank, slot - 2 * (2 * top - rank - 1)
        if going in chunks:
            messages.append(_Exchange(True, up.pop(going), rank + 1, going))
        if coming in chunks:
            messages.append(_Exchange(False, chain.place(coming), rank + 1, coming))
    if rank > 0:
        going, coming = slot - 2 * (2 * top - rank), slot - 2 * (rank - 1)
        if going in chunks:
            messages.append(_Exchange(True, down.pop(going), rank - 1, going))
        if coming in chunks:
            messages.append(_Exchange(False, chain.buffer(coming), rank - 1, coming))
    return messages


def _receive(chain: Chain, exchange: _Exchange, up: dict[int, Tensor], down: dict[int, Tensor]) -> None:
    """Fold a partial mean that came from below, or keep an average that came from above."""
    mean, number = exchange.tensor, exchange.chunk
    if exchange.peer < chain.rank:
        if chain.rank < chain.top:
            up[number] = chain.fold(mean, number)
            return
        average = chain.finish(mean, number)
    else:
        average = chain.settle(mean, number)
    if chain.rank > 0:
        down[number] = average
    else:
        chain.give_back(average)


def _start(chain: Chain, exchanges: list[_Exchange]) -> list[dist.Work]:
    operations = [
        dist.P2POp(
            dist.isend if exchange.sends else dist.irecv,
            exchange.tensor,
            dist.get_global_rank(chain.group, exchange.peer),
            chain.group,
        )
        for exchange in exchanges
    ]
    return dist.batch_isend_irecv(operations) if operations else []


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
