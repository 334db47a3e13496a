"""Means over seeds, with what is known of them from so few."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A mean over seeds and its interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """Mean and percentile interval over resampled seeds.

    Of three seeds the interval reaches from the least to the greatest: it says how far seeds lie apart, and no more.

    Args:
        values: one for each seed.
        confidence: share of the resampled means within the interval.

    Raises:
        ValueError: without values.

    Example:
        >>> bootstrap([1.0, 1.0, 4.0])
        Estimate(mean=2.0, low=1.0, high=4.0)
    """
    if not len(values):
        raise ValueError("Argument `values` expected one for each seed, but got none.")
    drawn = np.random.default_rng(0).choice(np.asarray(values, dtype=float), (RESAMPLES, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(np.mean(values)), float(low), float(high))
