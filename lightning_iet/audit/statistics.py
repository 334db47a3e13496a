"""How sure a share is, and whether one is larger than another by more than chance."""

from dataclasses import dataclass

from scipy.special import ndtri
from scipy.stats import binomtest, mannwhitneyu
from torch import Tensor

from lightning_iet.evaluation.verdict import SIGNIFICANT, Counts

LARGER = 0.1  # by how much a share has to be larger for nothing to be decided; what is smaller is only told


@dataclass(frozen=True)
class Share:
    """A count as a share of a total, with its 95 % Wilson interval."""

    count: int
    total: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Excess:
    """How much larger one share is than another, with its 95 % interval.

    ``p_value`` is the probability of a difference this large or larger if both sets were alike (Fisher's exact test,
    one-sided).
    """

    difference: float
    low: float
    high: float
    p_value: float


def share(count: int, total: int) -> Share:
    """Return a share with its Wilson interval, which holds its level also for counts of 0 and of few.

    Args:
        count: images that have some property.
        total: all images, at least one.

    Example:
        >>> from dataclasses import astuple
        >>> [round(part, 4) for part in astuple(share(0, 1000))]
        [0, 1000, 0.0, 0.0, 0.0038]
    """
    p, z = count / total, float(ndtri(0.975))
    # As scipy's binomtest has it, which takes a hundred times as long, for a p-value as well.
    denominator = 2 * (total + z**2)
    center = (2 * total * p + z**2) / denominator
    half = z / denominator * (4 * total * p * (1 - p) + z**2) ** 0.5
    return Share(count, total, p, center - half if count else 0.0, center + half if count < total else 1.0)


def excess(first: Share, second: Share) -> Excess:
    """Compare two shares of independent sets.

    The interval is Newcombe's (1998, method 10), which joins the two Wilson intervals.

    Args:
        first: the share that may be larger.
        second: the share to compare it with.

    Returns:
        Their difference, its interval, and the p-value.

    Example:
        >>> from dataclasses import astuple
        >>> [round(part, 4) for part in astuple(excess(share(20, 1000), share(5, 1000)))]
        [0.015, 0.0053, 0.0261, 0.0019]
    """
    difference = first.share - second.share
    down = ((first.share - first.low) ** 2 + (second.high - second.share) ** 2) ** 0.5
    up = ((first.high - first.share) ** 2 + (second.share - second.low) ** 2) ** 0.5
    p_value = Counts(first.count, first.total, second.count, second.total).p_value("greater")
    return Excess(difference, difference - down, difference + up, p_value)


@dataclass(frozen=True)
class Nearer:
    """A measure by which generated images lie nearer to training images than held-out images do.

    Attributes:
        name: the measure.
        generated: its value of the generated images.
        held_out: likewise.
        is_share: whether the values are shares.
        p_value: probability of such a difference if both sets were alike.
        is_large: whether it is a share larger by at least 10 percentage points *(our choice)*.
    """

    name: str
    generated: float
    held_out: float
    is_share: bool
    p_value: float
    is_large: bool


def nearer_share(name: str, generated: Share, held_out: Share) -> Nearer | None:
    """Compare two shares; return nothing if the first is not larger by more than chance (1 %, Fisher's exact test).

    Example:
        >>> found = nearer_share("MQ", share(70, 100), share(10, 100))
        >>> found.generated, found.p_value < 1e-9, nearer_share("MQ", share(12, 100), share(10, 100))
        (0.7, True, None)
        >>> found.is_large, nearer_share("MQ", share(120, 1000), share(80, 1000)).is_large
        (True, False)
    """
    p_value = excess(generated, held_out).p_value
    if p_value >= SIGNIFICANT:
        return None
    is_large = generated.count * held_out.total >= (held_out.count + LARGER * held_out.total) * generated.total
    return Nearer(name, generated.share, held_out.share, True, p_value, is_large)


def nearer_distances(name: str, generated: Tensor, held_out: Tensor) -> Nearer | None:
    """Compare two sets of distances; return nothing if the first's median is not smaller, and by more than chance.

    Chance is 1 % by the test of Mann and Whitney. None is called large: a blurred generator lies nearer to everything.

    Args:
        name: the measure.
        generated: shape ``(m,)``.
        held_out: shape ``(n,)``.

    Example:
        >>> import torch
        >>> near = torch.linspace(1, 2, 200)
        >>> nearer_distances("distance", 0.9 * near, near) is None, nearer_distances("distance", near, near)
        (False, None)
    """
    medians = float(generated.quantile(0.5)), float(held_out.quantile(0.5))
    p_value = float(mannwhitneyu(generated.numpy(), held_out.numpy(), alternative="less").pvalue)
    if medians[0] >= medians[1] or p_value >= SIGNIFICANT:
        return None
    return Nearer(name, *medians, False, p_value, False)


def fewer_than(total: int) -> float:
    """Return the upper 97.5 % limit of a share of which none of ``total`` images showed anything.

    Example:
        >>> round(fewer_than(500), 5)
        0.00735
    """
    return 1 - 0.025 ** (1 / total)


def least_share(found: int, planted: int) -> float:
    """Return the lower 97.5 % limit of the share of planted copies that are found (Clopper and Pearson 1934).

    With :func:`fewer_than`, whose limit is divided by it, an error has a probability of 5 %.

    Example:
        >>> round(least_share(20, 20), 3), least_share(0, 20)
        (0.832, 0.0)
    """
    return float(binomtest(found, planted, alternative="greater").proportion_ci(0.975, method="exact").low)
