"""What the scores of generated images say beside those of held-out images: whether it copies, and which are copies."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_iet.functional.copy_tests import (
    Scan,
    combined_p_values,
    false_discoveries,
    noticeable_below,
    scan_test,
)

if TYPE_CHECKING:
    from lightning_iet.audit.core import Copies

LARGEST = 0.5  # score above which no image is taken for a copy: half as far as the next training image, not less
SIGNIFICANT = 0.01  # p-value of the scan below which a generator is said to copy
NOTICEABLE = 0.05  # probability that an audit of innocent images has one that is noticed
LEAST_NOISE = 35.0  # dB; copies that differ by less are sure ones, if no held-out image comes near
NEARER = 3.0  # times than every held-out image
NEAR = 0.1  # sqrt(1 - c²) of a sure copy, where there are no held-out images
# Ratios below which an image is noticed where there are none, in the order of the searches: plain, recoloured, degraded
# (at 8 x 8 pixels innocent images come nearer to one another), moved.
WITHOUT_CONTROL = (1 / 3, 1 / 3, 1 / 6, 1 / 3)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the scores say.

    Attributes:
        sure: Generated images that are copies without any statistics, bool, shape ``(Q,)``.
        discovered: Those that are named by comparison with held-out images, bool, shape ``(Q,)``.
        noticed: Those so near to a training image that an innocent one seldom is, bool, shape ``(Q,)``.
        noticed_below: By each search the ratio below which an image is noticed, shape ``(S,)``.
        beyond: Generated images nearer than every held-out image, bool, shape ``(Q,)``.
        scan: The test of whether the generator copies, by the search that says it the most clearly; its p-value allows
            for their number. ``None`` without held-out images.
        scan_search: The position of that search.
        held_out_alike: Held-out images as near to a training image as the least near of those discovered.
    """

    sure: Tensor
    discovered: Tensor
    noticed: Tensor
    noticed_below: Tensor
    beyond: Tensor
    scan: Scan | None
    scan_search: int = 0
    held_out_alike: int = 0

    @property
    def named(self) -> Tensor:
        """Generated images that are named as copies."""
        return self.sure | self.discovered


def weigh(generated: "Copies", held_out: "Copies | None", *, level: float) -> Evidence:
    """Judge generated images by their scores, and by those of held-out images that went through the same searches.

    *Sure* copies need no statistics: they equal a training image in every pixel, or nearly so once the disguise is
    undone (more than 35 dB), and are at least three times nearer than every held-out image; without held-out images
    their score has to be below 1/3, in the search for degraded copies 1/6, and their distance below 0.1. Images of one
    colour are never sure copies.

    *Discovered* are those that the procedure of Benjamini and Hochberg names by conformal p-values, as long as the
    ratio that is the least likely is at most 0.5. Each search is calibrated by its own held-out ratios: where one comes
    near to innocent images too, as registration does among skies and walls, this takes nothing from the others.

    The *scan* looks at all thresholds up to 0.5 *(our choice: above it a blurred or noisy generator differs from real
    images without copying any)*, in each search by itself; the least p-value is multiplied by the number of searches
    (Bonferroni), so that no dependence among them can make it too small.

    *Noticed* are images that are so by any search, see :func:`noticeable`.

    Args:
        generated: What the searches found of the generated images.
        held_out: Likewise, of the held-out images.
        level: The share of false finds among discovered images.

    Returns:
        The evidence.
    """
    scores = generated.scores
    varied = ~generated.blank
    nearly = generated.identical | ((generated.noise > LEAST_NOISE) & (scores < max(WITHOUT_CONTROL)))
    ratios = generated.search_ratios
    if held_out is None:
        below = without_control(ratios.shape[1])
        near = (scores < below[generated.search]) & ((generated.search == 0) | (generated.distances < NEAR))
        sure = varied & nearly & (near | generated.identical)
        return Evidence(sure, torch.zeros_like(sure), is_noticed(ratios, below), below, torch.zeros_like(sure), None)
    control = held_out.search_ratios
    least = held_out.least_distances[generated.search]
    # An identical image is at distance 0: surely a copy, unless a held-out image is as near.
    nearer = (generated.distances * NEARER <= least) & (least > 0) & ~held_out.identical.any()
    sure = varied & nearly & nearer
    p_values, searches = combined_p_values(ratios, control)
    too_large = ratios.gather(1, searches[:, None])[:, 0] > LARGEST
    discovered = false_discoveries(p_values.masked_fill(too_large, 1.0), level=level)
    below = noticeable(control, len(scores))
    scan, scan_search = scan_searches(ratios, control)
    # A conformal p-value is a rank: (1 + number of held-out images as near) / (n + 1).
    alike = round(float(p_values[discovered].max()) * (len(control) + 1)) - 1 if discovered.any() else 0
    beyond = is_noticed(ratios, control.amin(dim=0))
    return Evidence(sure, discovered, is_noticed(ratios, below), below, beyond, scan, scan_search, alike)


def noticeable(held_out: Tensor, images: int) -> Tensor:
    """Return the ratio below which an innocent image seldom lies, for each search by itself.

    Searches share the probability that one of ``images`` innocent images is noticed, 5 % in all *(our choice)*.

    Args:
        held_out: Ratios of the held-out images by each search, shape ``(n, S)``.
        images: Number of images that are judged.

    Returns:
        Shape ``(S,)``, at most 0.5.
    """
    level = NOTICEABLE / held_out.shape[1]
    limits = [noticeable_below(ratios, images, level=level) for ratios in held_out.unbind(dim=1)]
    return torch.tensor(limits).clamp(max=LARGEST)


def without_control(searches: int) -> Tensor:
    """Return the ratios below which an image is noticed where there are no held-out images, shape ``(searches,)``."""
    return torch.tensor(WITHOUT_CONTROL[:searches])


def is_noticed(ratios: Tensor, below: Tensor) -> Tensor:
    """Tell which images lie below the limit of any search, shape ``(Q, S)`` and ``(S,)`` to ``(Q,)``."""
    return (ratios < below).any(dim=1)


def scan_searches(generated: Tensor, held_out: Tensor) -> tuple[Scan, int]:
    """Test by each search whether the generator copies, and return the clearest answer.

    Args:
        generated: Ratios by each search, shape ``(m, S)``.
        held_out: Likewise, shape ``(n, S)``.

    Returns:
        The scan, its p-value multiplied by the number of searches in which any ratio is at most 0.5; and which it is.
    """
    pairs = zip(generated.unbind(dim=1), held_out.unbind(dim=1), strict=True)
    scans = [scan_test(*pair, largest=LARGEST) for pair in pairs]
    best = min(range(len(scans)), key=lambda number: scans[number].p_value)
    # Labels can be exchanged whatever the pooled ratios are: to count by these keeps the p-value valid.
    count = sum(bool((torch.cat(pair) <= LARGEST).any()) for pair in zip(generated.T, held_out.T, strict=True))
    return scans[best]._replace(p_value=min(1.0, max(count, 1) * scans[best].p_value)), best
