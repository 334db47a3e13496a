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
WITHOUT_CONTROL = 1 / 3  # score below which an image is noticed where there are none


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the scores say.

    Attributes:
        sure: Generated images that are copies without any statistics, bool, shape ``(Q,)``.
        discovered: Those that are named by comparison with held-out images, bool, shape ``(Q,)``.
        noticed: Those so near to a training image that an innocent one seldom is, bool, shape ``(Q,)``.
        noticed_below: The score below which an image is noticed.
        beyond: Generated images nearer than every held-out image, bool, shape ``(Q,)``.
        scan: The test of whether the generator copies; ``None`` without held-out images.
        held_out_alike: Held-out images as near to a training image as the least near of those discovered.
    """

    sure: Tensor
    discovered: Tensor
    noticed: Tensor
    noticed_below: float
    beyond: Tensor
    scan: Scan | None
    held_out_alike: int = 0

    @property
    def named(self) -> Tensor:
        """Generated images that are named as copies."""
        return self.sure | self.discovered


def weigh(generated: "Copies", held_out: "Copies | None", *, level: float) -> Evidence:
    """Judge generated images by their scores, and by those of held-out images that went through the same searches.

    *Sure* copies need no statistics: they equal a training image in every pixel, or nearly so once the disguise is
    undone (more than 35 dB), and are at least three times nearer than every held-out image; without held-out images
    their score has to be below 1/3 and their distance below 0.1. Images of one colour are never sure copies.

    *Discovered* are those that the procedure of Benjamini and Hochberg names by conformal p-values, as long as the
    ratio that is the least likely is at most 0.5. Each search is calibrated by its own held-out ratios: where one comes
    near to innocent images too, as registration does among skies and walls, this takes nothing from the others.

    The *scan* looks at all thresholds up to 0.5 *(our choice: above it a blurred or noisy generator differs from real
    images without copying any)*.

    Args:
        generated: What the searches found of the generated images.
        held_out: Likewise, of the held-out images.
        level: The share of false finds among discovered images.

    Returns:
        The evidence.
    """
    scores = generated.scores
    varied = ~generated.blank
    nearly = generated.identical | ((generated.noise > LEAST_NOISE) & (scores < WITHOUT_CONTROL))
    if held_out is None:
        below = WITHOUT_CONTROL
        near = torch.where(generated.search == 0, scores < WITHOUT_CONTROL, generated.distances < NEAR)
        sure = varied & nearly & (near | generated.identical)
        return Evidence(sure, torch.zeros_like(sure), scores < below, below, torch.zeros_like(sure), None)
    least = held_out.least_distances[generated.search]
    # An identical image is at distance 0: surely a copy, unless a held-out image is as near.
    nearer = (generated.distances * NEARER <= least) & (least > 0) & ~held_out.identical.any()
    sure = varied & nearly & nearer
    p_values, searches = combined_p_values(generated.search_ratios, held_out.search_ratios)
    too_large = generated.search_ratios.gather(1, searches[:, None])[:, 0] > LARGEST
    discovered = false_discoveries(p_values.masked_fill(too_large, 1.0), level=level)
    below = min(noticeable_below(held_out.scores, len(scores), level=NOTICEABLE), LARGEST)
    scan = scan_test(scores, held_out.scores, largest=LARGEST)
    # A conformal p-value is a rank: (1 + number of held-out images as near) / (n + 1).
    alike = round(float(p_values[discovered].max()) * (len(held_out.scores) + 1)) - 1 if discovered.any() else 0
    return Evidence(sure, discovered, scores < below, below, scores < held_out.scores.min(), scan, alike)
