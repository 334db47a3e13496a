r"""Bins of a continuous time, so that a loss bank can hold one running mean for each.

Continuous times (the noise level of EDM, the time in [0, 1] of flow matching) have no index. They are cut into bins
that the training distribution fills equally *(our choice: however it is spread, every bin is visited equally often, as
the timesteps of discrete diffusion are)*; its quantiles are estimated from the times that training has drawn.

None of these functions waits for the device or loops over samples.
"""

import torch
from torch import Tensor


def equal_probability_edges(samples: Tensor, num_bins: int) -> Tensor:
    r"""Cut the line into bins that a distribution fills equally, given samples of it.

    The :math:`i`-th inner edge is the quantile at :math:`i / K`, interpolated linearly between neighbouring samples.

    Args:
        samples: Samples of the distribution, shape (n,), floating point, n ≥ 1.
        num_bins: Number of bins, :math:`K \ge 1`. There may be more bins than samples.

    Returns:
        The inner edges in ascending order, shape (K - 1,), in the type of ``samples``.

    Raises:
        ValueError: If there is no sample, or ``num_bins`` is less than 1.

    Example:
        >>> equal_probability_edges(torch.tensor([3.0, 0.0, 1.0, 2.0, 100.0]), 4)
        tensor([1., 2., 3.])
    """
    if num_bins < 1:
        raise ValueError(f"Argument `num_bins` expected at least 1, but got {num_bins}.")
    if samples.ndim != 1 or not len(samples):
        raise ValueError(
            f"Argument `samples` expected shape (n,) with n ≥ 1, but got {tuple(samples.shape)}. Flatten the samples."
        )
    ranks = torch.arange(1, num_bins, device=samples.device) * (len(samples) - 1)  # in units of 1 / K: exact integers
    below, part = ranks // num_bins, (ranks % num_bins).to(samples.dtype) / num_bins
    ordered = samples.sort().values
    lower, upper = ordered[below], ordered[(below + 1).clamp(max=len(samples) - 1)]
    return torch.lerp(lower, upper, part)


def bin_index(values: Tensor, edges: Tensor) -> Tensor:
    """Tell in which bin each value lies; a value on an edge lies in the bin above it.

    Args:
        values: Any shape, floating point.
        edges: Inner edges of K bins in ascending order, shape (K - 1,).

    Returns:
        Integers in [0, K), shape of ``values``.

    Example:
        >>> bin_index(torch.tensor([-5.0, 1.0, 1.5, 100.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor([0, 1, 1, 3])
    """
    return torch.searchsorted(edges, values.to(edges.dtype).contiguous(), right=True)
