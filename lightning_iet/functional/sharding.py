"""How samples are split into shards, shards into batches, and in which order a process walks through them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_iet.functional.checks import check_at_least

Partition = Literal["stratified", "iid"]
"""How samples are split: with the classes in equal shares, or without regard to them."""


def partition(
    num_samples: int, num_shards: int, *, labels: Sequence[int] | Tensor | None = None, seed: int = 0
) -> list[Tensor]:
    r"""Split ``0 … num_samples - 1`` into disjoint shards of equal size (to within one).

    The samples are shuffled, sorted by class where labels are given, and dealt out in turn: sample :math:`j` of that
    order goes to shard :math:`j \bmod K`. So both the shard sizes and the counts of each class differ by at most one.
    IET, https://arxiv.org/abs/2407.15328 §3.2, splits by class where labels exist and iid otherwise.

    Args:
        num_samples: Number of samples, n.
        num_shards: Number of shards, K.
        labels: One class per sample, shape ``(n,)``; ``None`` splits iid.
        seed: Seed of the shuffle. The split is fixed for a run.

    Returns:
        K sorted int64 index tensors that together hold each sample once.

    Raises:
        ValueError: If K < 1, or there are more shards than samples, or (with labels) than samples of some class.

    Example:
        >>> [shard.tolist() for shard in partition(5, 2, seed=0)]
        [[1, 2, 4], [0, 3]]
    """
    check_at_least(1, num_shards=num_shards)
    if num_shards > num_samples:
        raise ValueError(
            f"Argument `num_shards` expected at most one shard per sample ({num_samples}), but got {num_shards}."
        )
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    if labels is not None:
        classes = torch.as_tensor(labels)
        _check_labels(classes, num_samples, num_shards)
        order = order[torch.sort(classes[order], stable=True).indices]
    return [order[k::num_shards].sort().values for k in range(num_shards)]


def _check_labels(classes: Tensor, num_samples: int, num_shards: int) -> None:
    """Refuse labels that do not fit the samples, and classes too rare to be in every shard."""
    if classes.shape != (num_samples,):
        raise ValueError(
            f"Argument `labels` expected one label per sample, shape ({num_samples},), but got {tuple(classes.shape)}."
        )
    values, counts = classes.unique(return_counts=True)
    rarest = int(counts.argmin())
    if counts[rarest] < num_shards:
        raise ValueError(
            f"Argument `num_shards` expected at most {int(counts[rarest])} for a stratified split, since class "
            f"{values[rarest].item()} has only that many samples, but got {num_shards}. "
            "Use fewer shards, or partition='iid'."
        )


def to_assignment(shards: Sequence[Tensor], num_samples: int) -> Tensor:
    """Return the shard of each sample.

    Args:
        shards: Disjoint index tensors, at most 32,767 of them.
        num_samples: Number of samples, n.

    Returns:
        Shape ``(n,)``, int16; -1 where a sample is in no shard.

    Example:
        >>> to_assignment([torch.tensor([0, 3]), torch.tensor([1])], 4)
        tensor([ 0,  1, -1,  0], dtype=torch.int16)
    """
    assignment = torch.full((num_samples,), -1, dtype=torch.int16)
    for number, shard in enumerate(shards):
        assignment[shard] = number
    return assignment


def from_assignment(assignment: Tensor, num_shards: int) -> list[Tensor]:
    """Return the sorted samples of each shard: the reverse of :func:`to_assignment`.

    Example:
        >>> from_assignment(torch.tensor([0, 1, -1, 0], dtype=torch.int16), 2)
        [tensor([0, 3]), tensor([1])]
    """
    return [(assignment == shard).nonzero().flatten() for shard in range(num_shards)]


def steps_per_epoch(
    sizes: Sequence[int], batch_size: int, *, drop_last: bool = False, multiple_of: int = 1, limit: int | None = None
) -> int:
    """Return the number of batches that **every** shard takes in one epoch.

    One number for all shards, whatever their sizes: processes that host different shards stay in step (uneven numbers
    of batches would hang a distributed run), and every shard model takes equally many gradient steps.

    Args:
        sizes: Number of samples of each shard.
        batch_size: Largest number of samples in a batch.
        drop_last: Only full batches, ``floor(min size / batch size)``; otherwise ``ceil(max size / batch size)``.
        multiple_of: Round up (down with ``drop_last``) to a multiple, so that no window of accumulated gradients
            straddles two shards.
        limit: At most this many batches (``limit_train_batches``), itself kept at a multiple.

    Raises:
        ValueError: If a shard has fewer samples than batches, or no batch at all.

    Example:
        >>> steps_per_epoch([33, 32], batch_size=32), steps_per_epoch([33, 32], batch_size=32, drop_last=True)
        (2, 1)
    """
    check_at_least(1, batch_size=batch_size)
    batches = min(sizes) // batch_size if drop_last else -(-max(sizes) // batch_size)
    steps = batches // multiple_of * multiple_of if drop_last else -(-batches // multiple_of) * multiple_of
    if limit is not None:
        steps = min(steps, max(limit // multiple_of, 1) * multiple_of)
    if not 1 <= steps <= min(sizes):
        raise ValueError(
            f"Argument `batch_size` expected to give between 1 and {min(sizes)} batches to every shard (the smallest "
            f"has {min(sizes)} samples), but {batch_size} gives {steps}. Use a smaller batch or fewer shards"
            f"{', or drop_last=False' if drop_last else ''}."
        )
    return steps


def cut_batches(
    order: Tensor, num_batches: int, *, batch_size: int | None = None, drop_last: bool = False
) -> list[Tensor]:
    """Cut a shard's samples into batches of equal size (to within one).

    *(our choice)* Equal batches instead of full ones and a remainder: every shard can take the same number of steps
    although sizes differ by one, and no step rests on a handful of left-over samples.

    Args:
        order: Sample indices in the order of this epoch, shape ``(n,)``.
        num_batches: From :func:`steps_per_epoch`.
        batch_size: Largest batch. Samples beyond ``num_batches · batch_size`` wait for another epoch's shuffle.
        drop_last: Batches of exactly ``batch_size`` (for compiled models), the rest left out.

    Example:
        >>> [len(batch) for batch in cut_batches(torch.arange(33), 2, batch_size=32)]
        [17, 16]
    """
    if batch_size is not None:
        order = order[: num_batches * batch_size]
    if drop_last:
        return list(order.split(batch_size or len(order)))[:num_batches]
    return list(torch.tensor_split(order, num_batches))


def num_replicas(num_shards: int, num_processes: int) -> int:
    """Return n, the number of processes that train one shard together: 1 where a process has one shard or more.

    Args:
        num_shards: Number of shards, K.
        num_processes: Number of processes, W; must divide K, or be a multiple of it.

    Raises:
        ValueError: If neither number divides the other.

    Example:
        >>> num_replicas(8, 2), num_replicas(4, 8)
        (1, 2)
    """
    if num_shards % num_processes and num_processes % num_shards:
        raise ValueError(
            f"Argument `num_shards` expected a multiple or a divisor of the {num_processes} processes, but got "
            f"{num_shards}. Use num_shards={-(-num_shards // num_processes) * num_processes}, or a number of devices "
            "that divides it."
        )
    return max(num_processes // num_shards, 1)


def hosted_shards(num_shards: int, num_processes: int, rank: int) -> range:
    """Return the shards that a process trains: a block of K / W neighbours, or one that W / K neighbouring ranks share.

    Args:
        num_shards: Number of shards, K.
        num_processes: Number of processes, W; must divide K, or be a multiple of it.
        rank: This process, 0 … W - 1.

    Raises:
        ValueError: If neither number divides the other.

    Example:
        >>> hosted_shards(8, 2, 1), hosted_shards(2, 4, 1)
        (range(4, 8), range(0, 1))
    """
    first = rank // num_replicas(num_shards, num_processes)
    per_process = max(num_shards // num_processes, 1)
    return range(first * per_process, (first + 1) * per_process)


def replica_part(order: Tensor, replicas: int, replica: int) -> Tensor:
    """Return what one of n replicas of a shard reads of it: every n-th sample, as many as every other replica.

    Equal parts, so that the mean of the replicas' gradients is the gradient of their common batch. Up to n - 1 samples
    wait for another epoch's shuffle.

    Args:
        order: Sample indices of the shard in the order of this epoch, shape ``(m,)``.
        replicas: n.
        replica: 0 … n - 1.

    Returns:
        Shape ``(m // n,)``.

    Example:
        >>> replica_part(torch.arange(7), 2, 0), replica_part(torch.arange(7), 2, 1)
        (tensor([0, 2, 4]), tensor([1, 3, 5]))
    """
    return order[replica::replicas][: len(order) // replicas]


class ShardStep(NamedTuple):
    """One step of a process's walk through an epoch."""

    shard: int | None
    """The shard that takes the step; None while this process waits for others."""
    step: int
    """Which of that shard's steps in the epoch it is, from 0."""
    first: bool
    """Whether the process has just turned to this shard."""
    last: bool
    """Whether the process leaves this shard after it."""
    averaging: bool
    """Whether a round ends after it, since every shard has come this far."""


def walk(shards: Sequence[int], steps: int, *, epoch: int = 0, round_steps: int | None = None) -> list[ShardStep]:
    """Return the order in which a process takes the steps of an epoch: shard after shard.

    Between two averagings shards do not depend on each other, so a process walks through the shards that it hosts one
    after the other. Where a round ends inside the epoch (``round_steps``), all shards walk up to that point first.

    Args:
        shards: The hosted shards.
        steps: Steps of each shard in an epoch, S.
        epoch: Current epoch, from 0; rounds measured in steps run on across epochs.
        round_steps: Steps of each shard in a round; ``None`` leaves rounds to whole epochs, and no step ends one.

    Example:
        >>> [(s.shard, s.step, s.averaging) for s in walk([0, 1], steps=3, round_steps=2)]
        [(0, 0, False), (0, 1, False), (1, 0, False), (1, 1, True), (0, 2, False), (1, 2, False)]
    """
    done = epoch * steps
    ends = [s + 1 for s in range(steps) if round_steps and (done + s + 1) % round_steps == 0]
    starts = [0, *ends]
    result = []
    for start, stop in zip(starts, [*ends, steps], strict=True):
        for shard in shards:
            for step in range(start, stop):
                end = step == stop - 1
                averaging = end and stop in ends and shard == shards[-1]
                result.append(ShardStep(shard, step, first=step == start, last=end, averaging=averaging))
    return result


def resume(walks: Sequence[Sequence[ShardStep]], done: Sequence[int], rank: int) -> list[ShardStep]:
    """Return what is left of a process's walk when every shard has already taken some of its steps in this epoch.

    A run may go on with another number of processes than it was cut with. Then some processes have fewer steps left
    than others; they wait (``shard=None``) within the round, so that all processes take equally many steps and meet at
    every averaging in the same one.

    Args:
        walks: The whole epoch's walk of every process, from :func:`walk`.
        done: Steps that each shard of the run has taken.
        rank: This process.

    Returns:
        The remaining steps; equally many on all processes.

    Example:
        >>> walks = [walk([0, 1], steps=2), walk([2, 3], steps=2)]
        >>> [step[:2] for step in resume(walks, done=[2, 1, 0, 0], rank=0)]
        [(None, 0), (None, 0), (None, 0), (1, 1)]
    """
    result: list[ShardStep] = []
    for rounds in zip(*map(_rounds, walks), strict=True):
        left = [[step for step in steps if step.step >= done[step.shard or 0]] for steps in rounds]
        longest = max(map(len, left))
        waits = [_WAIT] * (longest - len(left[rank]))
        if longest and not left[rank]:
            # All shards of this process are there already; it still takes part in the averaging.
            waits[-1] = _WAIT._replace(averaging=rounds[rank][-1].averaging)
        result += waits + left[rank]
    return result


_WAIT = ShardStep(None, 0, first=False, last=False, averaging=False)


def _rounds(path: Sequence[ShardStep]) -> list[list[ShardStep]]:
    """Cut a walk behind each averaging."""
    ends = [i + 1 for i, step in enumerate(path) if step.averaging]
    cuts = [0, *(end for end in ends if end < len(path)), len(path)]
    return [list(path[start:end]) for start, end in pairwise(cuts)]
