r"""Anti-gradient control by a sample's own record: skip samples that are known better than others, draw after draw.

A single draw says little: at noisy timesteps losses scatter so much that many of them fall below any useful threshold
by chance. Averaged over a sample's draws, they say which samples the model knows by heart. In three steps:

1. :func:`update_log_loss_statistics`: mean :math:`\mu_b` and standard deviation :math:`s_b` of :math:`\log l` in each
   bin of the timestep, over *reference* images: the training samples, or images that the model does not train on;
2. :func:`standardized_losses`: :math:`z = (\log l_i - \mu_b) / s_b` for each sample of a batch;
3. :func:`update_record`: :math:`r_i \leftarrow \rho \, r_i + (1 - \rho) \, z`, the record of sample :math:`i`.

Then samples are left out whose record is low (:func:`keep_by_record`), or weighted so that all records become alike
(:func:`update_log_weights`). The *quantile* criterion leaves out 3 and judges each draw by its own :math:`z`.

It is ours; not published elsewhere as far as we know. None of these functions waits for the device or loops over
samples.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_iet.functional.anti_gradient import check_batch

MIN_VALUES = 20
"""Values of a bin before its statistics count."""
_MIN_DEVIATION = 1e-3
"""Least standard deviation of a log-loss, a thousandth of the loss: else a bin of equal losses would divide by zero."""


class LogLossStatistics(NamedTuple):
    """Running statistics of the logarithm of the loss in each bin of the timestep, each of shape (num_bins,)."""

    mean: Tensor
    """Mean of log l, floating point."""
    variance: Tensor
    """Variance of log l, floating point."""
    num_values: Tensor
    """Number of values so far, int64."""

    @classmethod
    def empty(cls, num_bins: int, *, device: torch.device | str | None = None) -> "LogLossStatistics":
        """Statistics of no values."""
        zeros = torch.zeros(num_bins, device=device)
        return cls(zeros, zeros.clone(), torch.zeros(num_bins, dtype=torch.long, device=device))


def update_log_loss_statistics(
    statistics: LogLossStatistics, losses: Tensor, bins: Tensor, decay: float, *, validate_args: bool = True
) -> LogLossStatistics:
    r"""Take the losses of reference images into the statistics, all of a batch at once.

    A bin in which :math:`n` values arrive, with mean :math:`m` and variance :math:`v` of :math:`\log l`, forgets the
    share :math:`1 - a` of what it knew:

    .. math::

        \mu' = a \mu + (1 - a) m, \qquad
        s'^2 = a \, (s^2 + (\mu - \mu')^2) + (1 - a) \, (v + (m - \mu')^2), \qquad
        a = d^n \frac{1 - d^N}{1 - d^{N + n}},

    where :math:`N` is the number of values before. That is the mean and the variance of all values so far, each
    weighted by :math:`d` for every value of a later batch *(our choice: the start at zero does not count)*.

    A loss that is NaN, infinite, zero or negative counts as absent *(our choice: it has no logarithm)*.

    Args:
        statistics: So far; not modified.
        losses: One loss per image, shape (B,), floating point. No gradient is taken.
        bins: The bin of each image's timestep, shape (B,), integers in [0, num_bins).
        decay: :math:`d` in [0, 1): the share of the statistics that one value leaves *(our choice: 0.9)*.
        validate_args: Whether the arguments are checked.

    Raises:
        ValueError: If the shapes disagree.
        TypeError: If ``losses`` is not floating point, or ``bins`` are not integers.

    Example:
        >>> statistics = LogLossStatistics.empty(2)
        >>> update_log_loss_statistics(statistics, torch.tensor([1.0, math.e**2]), torch.tensor([1, 1]), decay=0.9)
        LogLossStatistics(mean=tensor([0., 1.]), variance=tensor([0., 1.]), num_values=tensor([0, 2]))
    """
    if validate_args:
        check_batch(losses, bins)
    mean, variance, num_values = statistics
    bins = bins.long()
    logs, usable = _logarithms(losses, mean.dtype)
    number = torch.zeros_like(mean).index_add(0, bins, usable.to(mean.dtype))
    divisor = number.clamp(min=1)
    batch_mean = torch.zeros_like(mean).index_add(0, bins, logs) / divisor
    deviations = torch.where(usable, logs - batch_mean[bins], 0).square()
    batch_variance = torch.zeros_like(mean).index_add(0, bins, deviations) / divisor
    before = 1 - torch.pow(decay, num_values.to(mean.dtype))
    after = 1 - torch.pow(decay, num_values.to(mean.dtype) + number)
    share = torch.where(number > 0, torch.pow(decay, number) * before / after.clamp(min=1e-30), 1)
    new_mean = torch.lerp(batch_mean, mean, share)
    old_part = variance + (mean - new_mean).square()
    new_part = batch_variance + (batch_mean - new_mean).square()
    arrived = number > 0
    return LogLossStatistics(
        torch.where(arrived, new_mean, mean),
        torch.where(arrived, torch.lerp(new_part, old_part, share), variance),
        num_values + number.long(),
    )


def standardized_losses(
    losses: Tensor,
    bins: Tensor,
    statistics: LogLossStatistics,
    *,
    min_values: int = MIN_VALUES,
    validate_args: bool = True,
) -> Tensor:
    r"""Compute :math:`z_i = (\log l_i - \mu_b) / s_b`, how far a loss lies from what is usual at its timestep.

    It is 0, as if the loss were usual, while fewer than ``min_values`` values are in the bin, and for a loss that has
    no logarithm (NaN, infinite, zero or negative). The standard deviation is taken as 0.001 at least *(our choice)*.

    Args:
        losses: One loss per sample, shape (B,), floating point. No gradient is taken.
        bins: The bin of each sample's timestep, shape (B,), integers in [0, num_bins).
        statistics: Of the reference images.
        min_values: Values before a bin counts *(our choice: 20)*.
        validate_args: Whether the arguments are checked.

    Returns:
        Shape (B,), in the type of the statistics.

    Raises:
        ValueError: If the shapes disagree.
        TypeError: If ``losses`` is not floating point, or ``bins`` are not integers.

    Example:
        >>> statistics = LogLossStatistics(torch.tensor([1.0]), torch.tensor([4.0]), torch.tensor([20]))
        >>> standardized_losses(torch.tensor([math.e**3, 1.0]), torch.tensor([0, 0]), statistics)
        tensor([ 1.0000, -0.5000])
    """
    if validate_args:
        check_batch(losses, bins)
    bins = bins.long()
    mean, variance, num_values = (values.index_select(0, bins) for values in statistics)
    logs, usable = _logarithms(losses, mean.dtype)
    counts = usable & (num_values >= min_values)
    return torch.where(counts, (logs - mean) / variance.sqrt().clamp(min=_MIN_DEVIATION), 0)


def _logarithms(losses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The logarithm of each loss, 0 where it has none, and which have one."""
    losses = losses.detach().to(dtype)
    usable = losses.isfinite() & (losses > 0)
    return torch.where(usable, losses, 1).log(), usable


def update_record(
    record: Tensor, index: Tensor, scores: Tensor, decay: float, *, absent: Tensor | None = None
) -> Tensor:
    r"""Take a batch of draws into the records: :math:`r_i \leftarrow \rho \, r_i + (1 - \rho) \, z`, in batch order.

    A sample that is drawn :math:`n` times in the batch is updated :math:`n` times. Unrolled, that is

    .. math:: r_i \leftarrow \rho^n \, r_i + (1 - \rho) \sum_{j: i_j = i} \rho^{\,q_j} \, z_j,

    where :math:`q_j` counts the later draws of the same sample, in the order of the batch. Only the records of the
    batch are touched, so that the cost does not depend on how many samples there are.

    Args:
        record: Record of every sample, shape (n,), floating point; **modified in place**.
        index: The sample of each draw, shape (B,), integers in [0, n); a sample may occur several times.
        scores: :math:`z` of each draw, shape (B,), from :func:`standardized_losses`.
        decay: :math:`\rho` in [0, 1) *(our choice: 0.8)*.
        absent: Boolean, shape (B,): draws that do not count, such as those with a broken loss; ``None`` = all count.

    Returns:
        The new record of each draw's sample, shape (B,).

    Raises:
        ValueError: If the shapes disagree.

    Example:
        >>> record = torch.zeros(3)
        >>> update_record(record, torch.tensor([2, 0, 2]), torch.tensor([1.0, -1.0, 2.0]), decay=0.5)
        tensor([ 1.2500, -0.5000,  1.2500])
        >>> record
        tensor([-0.5000,  0.0000,  1.2500])
    """
    if not index.shape == scores.shape or index.ndim != 1:
        raise ValueError(
            f"Argument `index` expected the shape of `scores`, (B,), but got {tuple(index.shape)} and"
            f" {tuple(scores.shape)}. Pass one index per draw."
        )
    counts = torch.ones_like(index, dtype=torch.bool) if absent is None else ~absent
    index, scores = index.long(), scores.detach().to(record.dtype)
    number, later = _draws(index, counts)
    shares = torch.where(counts, (1 - decay) * torch.pow(decay, later.to(record.dtype)) * scores, 0)
    values = torch.pow(decay, number.to(record.dtype)) * record.index_select(0, index) + sum_by_index(index, shares)
    record.index_copy_(0, index, values)  # draws of one sample hold the same value: their order does not matter
    return values


def _draws(index: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """For each row, how many rows of its sample count, and how many of these come later in the batch; both (B,)."""
    order, first, position = _grouped(index)
    running = counts[order].long().cumsum(0)
    before = running[first] - counts[order][first].long()  # rows that count in earlier groups
    last = torch.searchsorted(index[order], index[order], right=True) - 1
    number = running[last] - before
    later = running[last] - running
    return number[position], later[position]


def _grouped(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The stable order that puts equal indices side by side, where each one's group begins in it, and its inverse."""
    groups, order = index.sort(stable=True)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order, torch.searchsorted(groups, groups), position


def sum_by_index(index: Tensor, values: Tensor) -> Tensor:
    """For each row of a batch, sum the values of all rows with its index.

    Args:
        index: Shape (B,), integers.
        values: Shape (B,).

    Returns:
        Shape (B,); rows of one index hold the same sum.

    Example:
        >>> sum_by_index(torch.tensor([7, 3, 7]), torch.tensor([1.0, 10.0, 2.0]))
        tensor([ 3., 10.,  3.])
    """
    order, first, position = _grouped(index)
    return torch.zeros_like(values).index_add(0, first, values[order])[first[position]]


def last_of_each(index: Tensor) -> Tensor:
    """Tell which rows of a batch hold the last draw of their sample.

    Where a value per draw is written to a table by sample, these rows win: an explicit order, since that in which an
    accelerator writes several values to one place is undefined.

    Args:
        index: Shape (B,), integers.

    Returns:
        Boolean tensor of shape (B,).

    Example:
        >>> last_of_each(torch.tensor([7, 3, 7]))
        tensor([False,  True,  True])
    """
    _, later = _draws(index, torch.ones_like(index, dtype=torch.bool))
    return later == 0


def typical_record(record: Tensor, seen: Tensor) -> Tensor:
    """Compute the median record of the samples that have been drawn, the lower one of two.

    Args:
        record: Shape (n,).
        seen: Number of draws of each sample, shape (n,), integers; those never drawn are left out *(our choice)*.

    Returns:
        Scalar tensor; NaN if none has been drawn.

    Example:
        >>> typical_record(torch.tensor([0.0, -3.0, 1.0, 2.0]), torch.tensor([0, 1, 1, 1]))
        tensor(1.)
    """
    return torch.where(seen > 0, record, torch.nan).nanmedian()


def keep_by_record(record: Tensor, limit: float | Tensor) -> Tensor:
    r"""Tell which samples stay in the loss: those with :math:`r_i \ge` ``limit``.

    The limit is :math:`-z_0` (:math:`z_0 = 1` against unseen images *(our choice)*), or relative to the other samples,
    :math:`\operatorname{median}(r) - \delta`. For the quantile criterion, pass the scores of the draws in the place of
    records.

    Args:
        record: Record (or score) of each draw's sample, shape (B,).
        limit: Number or scalar tensor; minus infinity keeps everything.

    Returns:
        Boolean tensor of shape (B,), True where a sample is kept; a record that is NaN is kept.

    Example:
        >>> keep_by_record(torch.tensor([0.3, -1.0, -1.1]), -1.0)
        tensor([ True,  True, False])
    """
    return ~(record < limit)


def update_log_weights(
    log_weights: Tensor,
    index: Tensor,
    record: Tensor,
    typical: float | Tensor,
    rate: float | Tensor,
    *,
    min_weight: float = 0.02,
    absent: Tensor | None = None,
) -> Tensor:
    r"""Lower the weight of samples whose record lies below the median, or a limit, and raise the others', up to 1.

    .. math::

        \log w_i \leftarrow
        \operatorname{clip}(\log w_i + n \, \eta \, (r_i - m), \, \log w_{\min}, \, 0)

    for each sample of the batch, where :math:`n` is the number of its draws in it *(our choice: one step per batch,
    with the record after all of them)*, and :math:`m` is :math:`\operatorname{median}(r)`, which makes all records
    alike, or a limit below it, which spares samples that are merely easy.

    Args:
        log_weights: Of every sample, shape (n,), floating point, at most 0; **modified in place**.
        index: The sample of each draw, shape (B,), integers in [0, n).
        record: New record of each draw's sample, shape (B,), from :func:`update_record`.
        typical: :math:`m`: the median record, from :func:`typical_record`, or a limit as of :func:`keep_by_record`;
            number or scalar tensor.
        rate: :math:`\eta \ge 0` *(our choice: 0.03 with the median, 0.1 to 0.2 with a limit below it)*; or one of each
            draw, shape (B,), see :func:`pace_of_draws`.
        min_weight: Least weight, in (0, 1] *(our choice: 0.02)*.
        absent: Boolean, shape (B,): draws that do not count; ``None`` = all count.

    Returns:
        The weight of each draw, in (0, 1], shape (B,).

    Example:
        >>> log_weights = torch.zeros(2)
        >>> index, record = torch.tensor([0, 1]), torch.tensor([-2.0, 1.0])
        >>> update_log_weights(log_weights, index, record, torch.tensor(0.0), rate=0.1)
        tensor([0.8187, 1.0000])
    """
    index = index.long()
    counts = torch.ones_like(index, dtype=torch.bool) if absent is None else ~absent
    number, _ = _draws(index, counts)
    step = torch.where(number > 0, number.to(record.dtype) * rate * (record - typical), 0)
    values = (log_weights.index_select(0, index) + step).clamp(math.log(min_weight), 0)
    log_weights.index_copy_(0, index, values)
    return values.exp()


def draw_by_weight(weights: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    r"""Draw as many samples as there are, each in proportion to its weight: weights act on how often, not how much.

    Sample :math:`i` is to be drawn :math:`p_i = n \, w_i / \sum_j w_j` times. It is drawn
    :math:`\lfloor p_i \rfloor` or :math:`\lceil p_i \rceil` times, and :math:`p_i` times on average (systematic
    resampling of the samples in random order). A sample that is drawn keeps its place; what else is drawn takes the
    places of samples that are not, in random order. So equal weights change nothing *(our choice)*.

    Args:
        weights: Shape (n,), floating point, positive.
        generator: Of the random numbers, on the device of the weights; ``None`` = torch's global one.

    Returns:
        The sample that each place is given to, shape (n,), int64.

    Example:
        >>> draw_by_weight(torch.ones(4))
        tensor([0, 1, 2, 3])
        >>> generator = torch.Generator().manual_seed(0)
        >>> draw_by_weight(torch.tensor([1.0, 1.0, 0.01, 0.01]), generator=generator).bincount(minlength=4)
        tensor([2, 2, 0, 0])
    """
    size, device = len(weights), weights.device
    order = torch.randperm(size, generator=generator, device=device)
    expected = weights.double()[order]
    ends = (expected * (size / expected.sum())).cumsum(0)
    marks = torch.arange(size, device=device) + torch.rand((), generator=generator, dtype=torch.float64, device=device)
    drawn = order[torch.searchsorted(ends, marks, right=True).clamp(max=size - 1)]
    times = drawn.bincount(minlength=size)
    places = torch.arange(size, device=device)
    more = places.repeat_interleave((times - 1).clamp(min=0))
    places[times == 0] = more[torch.randperm(len(more), generator=generator, device=device)]
    return places


def pace_of_draws(weights: Tensor, *, most: float = 5.0) -> Tensor:
    r"""Compute how much longer a weight's step is for being drawn seldom: :math:`\min(\bar{w} / w_i, 5)`.

    A sample of weight :math:`w_i` is drawn :math:`w_i / \bar{w}` times as often as others. With steps of
    :func:`update_log_weights` longer by as much, weights move as fast from epoch to epoch as if they acted on the loss.

    Args:
        weights: Those that samples are drawn by, shape (n,).
        most: Longest step; a sample that comes up in one epoch of 50 must not leap *(our choice)*.

    Returns:
        Shape (n,).

    Example:
        >>> pace_of_draws(torch.tensor([1.0, 1.0, 0.4]))
        tensor([0.8000, 0.8000, 2.0000])
    """
    return (weights.mean() / weights).clamp(max=most)


def weighted_mean(losses: Tensor, weights: Tensor, *, divisor: Tensor | int | None = None) -> Tensor:
    r"""Average the losses by weight: :math:`\sum_i w_i l_i / \sum_i w_i`.

    Args:
        losses: One loss per sample, shape (B,). Half precision is summed in float32.
        weights: Shape (B,), not negative. A weight of 0 leaves a sample out, whatever its loss.
        divisor: What to divide by instead of the sum of the weights, see
            :func:`~lightning_iet.functional.anti_gradient.masked_mean`.

    Returns:
        Scalar tensor of the type of ``losses``; 0 with zero gradients if all weights are 0.

    Example:
        >>> weighted_mean(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 0.5]))
        tensor(2.)
    """
    if weights.shape != losses.shape:
        raise ValueError(
            f"Argument `weights` expected the shape of `losses`, {tuple(losses.shape)}, but got {tuple(weights.shape)}."
        )
    dtype = torch.promote_types(losses.dtype, torch.float32)
    weights = weights.to(dtype)
    # where, not a product alone: 0 * inf is NaN
    total = torch.where(weights > 0, losses.to(dtype) * weights, 0).sum()
    if divisor is None:
        divisor = weights.sum().clamp(min=torch.finfo(dtype).tiny)
    return (total / divisor).to(losses.dtype)
