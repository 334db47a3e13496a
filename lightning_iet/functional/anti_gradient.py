r"""Anti-gradient control (AGC): leave samples out of the loss whose loss is far under what is usual at their timestep.

A *loss bank* :math:`b_t` holds one running mean of the loss for each timestep :math:`t = 0, …, T-1` and starts at zero.
For a batch of per-sample losses :math:`l_i` at timesteps :math:`t_i`, threshold :math:`\lambda` and decay :math:`d`:

1. :func:`keep_mask`: sample :math:`i` is kept if :math:`l_i \ge \lambda \, b_{t_i}`;
2. :func:`masked_mean`: the loss is the mean over the samples that are kept;
3. :func:`update_bank`: then **every** sample enters the bank, :math:`b_{t_i} \leftarrow d \, b_{t_i} + (1 - d) \, l_i`.

Method: Liu, Guan, Wu, Miao, *Iterative Ensemble Training with Anti-Gradient Control for Mitigating Memorization in
Diffusion Models*, ECCV 2024, https://arxiv.org/abs/2407.15328, where the threshold is given as
``mem_ratio`` :math:`= 1 / \lambda`.

*Anchored* AGC (ours) fills the bank with losses of images that the model is not trained on, by
:func:`update_anchored_bank` in the place of 3: the threshold then does not sink while a set is learnt by heart.

None of these functions waits for the device or loops over samples.
"""

from math import inf

import torch
from torch import Tensor


def check_batch(losses: Tensor, timesteps: Tensor, *, name: str = "losses", continuous: bool = False) -> None:
    """Raise unless there is one floating-point loss and one timestep for each sample.

    Looks at shapes and types only, so it costs no wait for the device; the values of ``timesteps`` are not checked.

    Args:
        losses: One loss per sample, shape (B,), floating point.
        timesteps: The timestep of each sample, shape (B,), integer.
        name: What the caller calls ``losses``, for the message.
        continuous: Whether floating-point timesteps will do as well.

    Raises:
        ValueError: If ``losses`` is not of shape (B,), or ``timesteps`` of another shape.
        TypeError: If ``losses`` is not floating point, or ``timesteps`` are not integers.

    Example:
        >>> check_batch(torch.rand(4), torch.tensor([3, 1, 4]))
        Traceback (most recent call last):
        ValueError: Argument `timesteps` expected the shape of `losses`, (4,), but got (3,). ...
    """
    if losses.ndim != 1:
        raise ValueError(
            f"Argument `{name}` expected one loss per sample, shape (B,), but got {tuple(losses.shape)}."
            " Average over every dimension but the first."
        )
    if timesteps.shape != losses.shape:
        raise ValueError(
            f"Argument `timesteps` expected the shape of `{name}`, {tuple(losses.shape)},"
            f" but got {tuple(timesteps.shape)}. Pass one timestep per sample."
        )
    if not losses.is_floating_point():
        raise TypeError(f"Argument `{name}` expected a floating-point tensor, but got {losses.dtype}. Convert it.")
    if timesteps.is_complex() or timesteps.dtype == torch.bool or (timesteps.is_floating_point() and not continuous):
        wanted, remedy = "integers", "Divide continuous times into bins, see lightning_iet.functional.binning"
        raise TypeError(
            f"Argument `timesteps` expected {f'{wanted} or floating-point numbers' if continuous else wanted},"
            f" but got {timesteps.dtype}. {'Convert them' if continuous else remedy}."
        )


def keep_mask(
    losses: Tensor, timesteps: Tensor, bank: Tensor, threshold: float, *, validate_args: bool = True
) -> Tensor:
    r"""Tell which samples stay in the loss: those with :math:`l_i \ge \lambda \, b_{t_i}`.

    A loss that is NaN or infinite is kept *(our choice: leaving it out would hide a broken run from its user)*.
    A threshold of zero keeps everything, a negative loss too.

    Args:
        losses: One loss per sample, shape (B,), floating point; compared in the type of ``bank``. No gradient is taken.
        timesteps: The timestep of each sample, shape (B,), integers in [0, T).
        bank: Running mean of the loss by timestep, shape (T,), see :func:`update_bank`.
        threshold: :math:`\lambda` in [0, 1]; 0.5 was published for CIFAR-10 and 0.8 for Stable Diffusion.
        validate_args: Whether the arguments are checked; a caller that has called :func:`check_batch` need not.

    Returns:
        Boolean tensor of shape (B,), True where a sample is kept.

    Raises:
        ValueError: If the shapes disagree.
        TypeError: If ``losses`` is not floating point, or ``timesteps`` are not integers.
        IndexError: If a timestep is not in [0, T), where the device reports it (the CPU does).

    Example:
        >>> bank = torch.tensor([0.0, 0.2, 0.4])
        >>> keep_mask(torch.tensor([0.10, 0.19, 0.21]), torch.tensor([1, 2, 2]), bank, threshold=0.5)
        tensor([ True, False,  True])
    """
    if validate_args:
        check_batch(losses, timesteps)
    if threshold == 0:
        return torch.ones_like(losses, dtype=torch.bool)
    losses = losses.detach().to(bank.dtype)
    usual = bank.index_select(0, timesteps.long())
    return (losses >= threshold * usual) | ~is_finite(losses)


def is_finite(losses: Tensor) -> Tensor:
    """Tell which losses are neither NaN nor infinite, as ``isfinite``, in half as many operations.

    Example:
        >>> is_finite(torch.tensor([-1.0, float("nan"), float("inf"), float("-inf")]))
        tensor([ True, False, False, False])
    """
    return losses.abs() < inf


def masked_mean(losses: Tensor, keep: Tensor, *, divisor: Tensor | int | None = None) -> Tensor:
    r"""Average the losses that are kept: :math:`\sum_i k_i l_i / \max(1, \sum_i k_i)`.

    A sample that is left out has a gradient of exactly zero, whatever its loss. If no sample is kept, the result is
    zero with zero gradients; it still hangs on the graph, so that ``backward`` works and no process waits for another.

    Args:
        losses: One loss per sample, shape (B,). Half precision is summed in float32.
        keep: Boolean tensor of shape (B,), True where a sample is kept.
        divisor: What to divide by instead of the number that is kept, at least 1. Where n processes share a batch and
            average their gradients, it is the number kept of all over n. With the size of the batch, the step shrinks
            as samples drop out.

    Returns:
        Scalar tensor of the type of ``losses``.

    Raises:
        ValueError: If the shapes disagree.

    Example:
        >>> masked_mean(torch.tensor([1.0, 2.0, float("inf")]), torch.tensor([True, True, False]))
        tensor(1.5000)
    """
    if keep.shape != losses.shape:
        raise ValueError(
            f"Argument `keep` expected the shape of `losses`, {tuple(losses.shape)}, but got {tuple(keep.shape)}."
            " Take it from keep_mask of the same batch."
        )
    # where, not a product: 0 * inf is NaN
    total = torch.where(keep, losses, 0).sum(dtype=torch.promote_types(losses.dtype, torch.float32))
    return (total / (keep.sum().clamp(min=1) if divisor is None else divisor)).to(losses.dtype)


def update_bank(bank: Tensor, losses: Tensor, timesteps: Tensor, decay: float, *, validate_args: bool = True) -> Tensor:
    r"""Take every sample into the bank, in batch order: :math:`b_{t_i} \leftarrow d \, b_{t_i} + (1 - d) \, l_i`.

    A timestep that the batch holds :math:`n` times is updated :math:`n` times. Unrolled, that is

    .. math:: b_t \leftarrow d^{\,n} \, b_t + (1 - d) \sum_{i: t_i = t} d^{\,r_i} \, l_i,

    where :math:`r_i` counts the samples after :math:`i` that have its timestep; no loop is needed.

    A loss that is NaN or infinite counts as absent *(our choice: the bank could never forget it)*.

    Args:
        bank: Running mean of the loss by timestep, shape (T,), floating point; it is not modified.
        losses: One loss per sample, shape (B,), floating point; taken in the type of ``bank``. No gradient is taken.
        timesteps: The timestep of each sample, shape (B,), integers in [0, T).
        decay: :math:`d` in [0, 1); 0.8 was published. Zero remembers the last loss only.
        validate_args: Whether the arguments are checked; a caller that has called :func:`check_batch` need not.

    Returns:
        The new bank, shape (T,), in the type of ``bank``.

    Raises:
        ValueError, TypeError, IndexError: As :func:`keep_mask`.

    Example:
        >>> update_bank(torch.zeros(3), torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0, 2, 2]), decay=0.8)
        tensor([0.2000, 0.0000, 0.5600])
    """
    if validate_args:
        check_batch(losses, timesteps)
    losses = losses.detach().to(bank.dtype)
    finite, timesteps = is_finite(losses), timesteps.long()
    # Sorted, the samples of a timestep are neighbours in batch order, and those that count as absent stand at the end.
    groups, order = torch.where(finite, timesteps, bank.shape[0]).sort(stable=True)
    places = torch.arange(1, groups.shape[0] + 1, device=groups.device)
    later = torch.searchsorted(groups, groups, right=True) - places
    shares = (1 - decay) * decay ** later.to(bank.dtype)
    timesteps, finite, losses = (values.index_select(0, order) for values in (timesteps, finite, losses))
    counts = torch.zeros_like(bank).index_add_(0, timesteps, finite.to(bank.dtype))
    learnt = torch.zeros_like(bank).index_add_(0, timesteps, torch.where(finite, shares * losses, 0))
    return bank * decay**counts + learnt


def update_anchored_bank(
    bank: Tensor, losses: Tensor, timesteps: Tensor, decay: float, *, validate_args: bool = True
) -> Tensor:
    r"""Take losses of unseen images into the bank, all at once: :math:`b_t \leftarrow d^n b_t + (1 - d^n) \bar{l}_t`.

    Here :math:`n` is the number of samples at the timestep and :math:`\bar{l}_t` their mean: as much is forgotten as in
    :func:`update_bank`, and the samples of a batch, which have no order of their own, count alike *(our choice)*.

    A loss that is NaN or infinite counts as absent *(our choice: the bank could never forget it)*.

    Args:
        bank: Running mean of the loss by timestep (or by bin), shape (T,), floating point; it is not modified.
        losses: One loss per sample, shape (B,), floating point; taken in the type of ``bank``. No gradient is taken.
        timesteps: The timestep (or the bin) of each sample, shape (B,), integers in [0, T).
        decay: :math:`d` in [0, 1): the share of the bank that one sample leaves.
        validate_args: Whether the arguments are checked; a caller that has called :func:`check_batch` need not.

    Returns:
        The new bank, shape (T,), in the type of ``bank``.

    Raises:
        ValueError, TypeError, IndexError: As :func:`keep_mask`.

    Example:
        >>> update_anchored_bank(torch.ones(3), torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 2, 2]), decay=0.5)
        tensor([2.0000, 1.0000, 1.3750])
    """
    if validate_args:
        check_batch(losses, timesteps)
    losses, timesteps = losses.detach().to(bank.dtype), timesteps.long()
    finite = is_finite(losses)
    counts = torch.zeros_like(bank).index_add_(0, timesteps, finite.to(bank.dtype))
    sums = torch.zeros_like(bank).index_add_(0, timesteps, torch.where(finite, losses, 0))
    return torch.lerp(sums / counts.clamp(min=1), bank, decay**counts)
