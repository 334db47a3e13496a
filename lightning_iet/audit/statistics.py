"""How sure a share is, and whether one is larger than another by more than chance."""

from dataclasses import dataclass

from scipy.stats import binomtest, fisher_exact


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

    Returns:
        The share and its interval.

    Example:
        >>> from dataclasses import astuple
        >>> [round(part, 4) for part in astuple(share(0, 1000))]
        [0, 1000, 0.0, 0.0, 0.0038]
    """
    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return Share(count, total, count / total, float(interval.low), float(interval.high))


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
    table = [[part.count, part.total - part.count] for part in (first, second)]
    p_value = float(fisher_exact(table, alternative="greater").pvalue)
    return Excess(difference, difference - down, difference + up, p_value)
