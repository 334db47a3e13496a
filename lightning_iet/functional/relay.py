"""Moving the chunks of an average along a chain of processes."""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from lightning_iet.functional.chain import Chain

__all__ = ["relay"]

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
