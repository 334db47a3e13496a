r"""Memory samples redistribution (MSR): the most skipped samples of each shard move to the next shard of a ring.

Anti-gradient control leaves a sample out of the loss when the model is about to memorise it. The samples that it left
out most often are the ones that their shard's model knows best; moved to the next shard, they meet a model that has not
trained on them since the last averaging.

Source: Guan, Wu, Huang, Liu, Miao, Yang, *Redistribute Ensemble Training for Mitigating Memorization in Diffusion
Models*, https://arxiv.org/abs/2502.09434, and the authors' code (github.com/liuxiao-guan/DCR_X). Published: a fraction
of 0.25, in the middle of each round, by the number of skips since the last exchange. Choices that were left open or
made otherwise there are marked below.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_iet.functional.checks import check_kinds

ExchangeTime = Literal["half_round", "round"]
"""When samples are exchanged: in the middle of each round, or at its end."""


class Exchange(NamedTuple):
    """The result of :func:`redistribute`."""

    shards: list[Tensor]
    """The new shards: K sorted int64 index tensors, each as long as before."""
    moved: list[Tensor]
    """The samples that left each shard, most skipped first within a class; K int64 index tensors of one length."""


def redistribute(
    shards: Sequence[Tensor],
    skips: Tensor,
    fraction: float,
    *,
    min_skips: int = 1,
    labels: Tensor | None = None,
    random_seed: int | None = None,
) -> Exchange:
    r"""Move the most skipped samples of each shard to the next shard of a ring, all shards at once.

    Of shard :math:`D_c` those samples may move that were skipped often enough,
    :math:`E_c = \{i \in D_c : s_i \ge s_\min\}`. The first

    .. math:: k = \min_c \min(\lfloor q \, |D_c| \rfloor, \, |E_c|)

    of them by :math:`(-s_i, i)` leave every shard, and shard :math:`(c + 1) \bmod K` takes them in. What a shard takes
    in is not passed on in the same exchange, and sizes do not change. With labels the same is done within each class,
    with :math:`k_y` for class :math:`y`, so that the class counts of each shard do not change either.

    Equal numbers of skips: the smaller index moves *(our choice: deterministic; published: whatever the selection by
    value leaves)*. Equally many samples leave every shard, also where few may *(our choice: published is*
    :math:`k = \lfloor q n_c \rfloor` *whether they were skipped or not)*. Exchange within classes *(our choice, where
    the split was stratified)*.

    Args:
        shards: K disjoint index tensors, each of shape ``(n_c,)``, integers in [0, n).
        skips: Number of skips of every sample since the last exchange, shape ``(n,)``, integers; on the CPU.
        fraction: :math:`q` in [0, 0.5], the largest share of a shard that moves; 0.25 was published. Taken as the
            fraction with a denominator up to 10,000 that is nearest to it, so that ``0.29`` of 100 samples are 29.
        min_skips: :math:`s_\min \ge 0` *(our choice: 1, what was never skipped stays; 0 was published)*.
        labels: Class of every sample, shape ``(n,)``; ``None`` = exchange without regard to classes.
        random_seed: Draw the :math:`k` samples of each shard at random instead, from all that it holds (of the class):
            the control that shows whether it matters *which* samples move.

    Raises:
        ValueError: If ``fraction`` or ``min_skips`` is out of range, there is one shard only and ``fraction`` is above
            0, or an index has no number of skips or no label.

    Example:
        >>> shards = [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7])]
        >>> skips = torch.tensor([0, 9, 9, 1, 0, 0, 5, 7])
        >>> [shard.tolist() for shard in redistribute(shards, skips, 0.25).shards]
        [[0, 2, 3, 7], [1, 4, 5, 6]]
    """
    check_exchange(fraction, min_skips, len(shards))
    _check_tables(shards, skips, labels)
    groups, num_classes = _classes_of(shards, labels)
    most = _shares_of(groups, num_classes, fraction)
    eligible = [
        group.bincount(weights=(skips[shard] >= min_skips).double(), minlength=num_classes).long()
        for shard, group in zip(shards, groups, strict=True)
    ]
    number = torch.stack([*most, *eligible]).amin(0)  # of samples that leave a shard, by class
    generator = None if random_seed is None else torch.Generator().manual_seed(random_seed)
    kept, moved = [], []
    for shard, group in zip(shards, groups, strict=True):
        order = shard.argsort()
        if generator is None:
            order = order[skips[shard[order]].argsort(stable=True, descending=True)]
        else:
            order = order[torch.randperm(len(order), generator=generator)]
        order = order[group[order].argsort(stable=True)]
        starts = group.bincount(minlength=num_classes).cumsum(0).roll(1).index_fill(0, torch.tensor([0]), 0)
        rank = torch.arange(len(order)) - starts[group[order]]
        leaves = rank < number[group[order]]
        moved.append(shard[order[leaves]])
        kept.append(shard[order[~leaves]])
    received = [moved[number - 1] for number in range(len(moved))]
    return Exchange([torch.cat(pair).sort().values for pair in zip(kept, received, strict=True)], moved)


def most_that_move(shards: Sequence[Tensor], fraction: float, labels: Tensor | None = None) -> int:
    """Count the samples that leave each shard if all are skipped often enough, see :func:`redistribute`; 0 = none ever.

    Example:
        >>> shards, labels = [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7])], torch.arange(8) % 4
        >>> most_that_move(shards, 0.25), most_that_move(shards, 0.25, labels)
        (1, 0)
    """
    return int(torch.stack(_shares_of(*_classes_of(shards, labels), fraction)).amin(0).sum())


def _classes_of(shards: Sequence[Tensor], labels: Tensor | None) -> tuple[list[Tensor], int]:
    """Number of the class of each sample of each shard, from 0, and how many classes there are."""
    if labels is None:
        return [torch.zeros_like(shard) for shard in shards], 1
    classes = labels.unique(return_inverse=True)[1].long()
    return [classes[shard] for shard in shards], int(classes.max()) + 1


def _shares_of(groups: Sequence[Tensor], num_classes: int, fraction: float) -> list[Tensor]:
    """Largest number of samples of each class that may leave each shard."""
    share = Fraction(fraction).limit_denominator(10_000)
    return [group.bincount(minlength=num_classes) * share.numerator // share.denominator for group in groups]


def is_exchange_epoch(
    epoch: int,
    *,
    at: ExchangeTime = "half_round",
    round_epochs: int | None = None,
    round_steps: int | None = None,
    epoch_steps: int | None = None,
) -> bool:
    r"""Tell whether samples are exchanged at the end of an epoch.

    The batches of an epoch are planned at its start, so that an exchange takes effect at an epoch boundary *(our
    choice: no sample is read twice or never in an epoch)*. ``"half_round"`` is the end of the first epoch that reaches
    the middle of a round: epoch :math:`\lceil E / 2 \rceil` of a round of :math:`E` epochs, so that a round of one
    epoch exchanges at its end; or the first epoch end at or after step :math:`(r + 1/2) R` of each shard.

    Args:
        epoch: Which epoch ends, from 0.
        at: ``"half_round"``, which was published, or ``"round"``.
        round_epochs: Length of a round in epochs, :math:`E`.
        round_steps: Length of a round in steps of each shard, :math:`R`, instead.
        epoch_steps: Steps of each shard in an epoch, with ``round_steps``.

    Example:
        >>> [is_exchange_epoch(epoch, round_epochs=3) for epoch in range(6)]
        [False, True, False, False, True, False]
        >>> [is_exchange_epoch(epoch, round_steps=10, epoch_steps=4) for epoch in range(6)]
        [False, True, False, True, False, False]
    """
    length, step = (round_epochs, 1) if round_steps is None else (round_steps, epoch_steps)
    if length is None or step is None:
        raise ValueError("Argument `round_epochs` expected a number, or `round_steps` and `epoch_steps`, but got None.")

    def passed(steps: int) -> int:  # exchanges that are due in so many steps
        if at == "round":
            return steps // length
        half = length if round_steps is not None else 2 * -(-length // 2)  # twice the middle of a round
        return (2 * steps - half) // (2 * length) + 1

    return passed((epoch + 1) * step) > passed(epoch * step)


def check_exchange(fraction: float, min_skips: int, num_shards: int | None = None) -> None:
    """Refuse arguments of :func:`redistribute` that are out of range; the number of shards may not be known yet.

    Raises:
        TypeError: If one is no number, or no integer.
        ValueError: Naming the argument, and what to pass instead.
    """
    check_kinds(float, fraction=fraction)
    check_kinds(int, min_skips=min_skips)
    if not 0 <= fraction <= 0.5:
        raise ValueError(
            f"Argument `fraction` expected a number in [0, 0.5], but got {fraction}. 0.25 was published, 0 is off."
        )
    if min_skips < 0:
        raise ValueError(f"Argument `min_skips` expected an integer ≥ 0, but got {min_skips}. 0 was published.")
    if num_shards is not None and num_shards < 2 and fraction > 0:
        raise ValueError(
            f"Argument `fraction` expected 0 with {num_shards} shard, but got {fraction}: samples move from one shard"
            " to the next. Train with 2 or more shards (--averaging.num_shards)."
        )


def _check_tables(shards: Sequence[Tensor], skips: Tensor, labels: Tensor | None) -> None:
    """Refuse tables that are shorter than the shards' indices say."""
    needed = max((int(shard.max()) + 1 for shard in shards if len(shard)), default=0)
    for name, table in (("skips", skips), ("labels", labels)):
        if table is not None and (table.ndim != 1 or len(table) < needed):
            raise ValueError(
                f"Argument `{name}` expected one number per sample, shape (n,) with n ≥ {needed}, but got"
                f" {tuple(table.shape)}."
            )
