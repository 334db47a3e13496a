"""The figures of an audit, plain numbers and words only: what goes into ``metrics.json``, the table and the report."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_iet.audit.core import Audit, Copies, most_copied
from lightning_iet.audit.features import SSCD
from lightning_iet.audit.reading import ImageSet
from lightning_iet.audit.statistics import Excess, Share, excess, share
from lightning_iet.data.samples import Skip
from lightning_iet.evaluation.membership import Membership
from lightning_iet.evaluation.memorization import Closeness, below
from lightning_iet.functional.duplicates import Duplicates
from lightning_iet.functional.sscd_similarity import similarity_summary
from lightning_iet.utilities.files import printable

PACKAGES = ("lightning-iet", "torch", "numpy", "pillow")
LISTED = 100  # groups of duplicates and training images copied most that are listed by name


@dataclass(frozen=True)
class SetFacts:
    """What a set of images consists of. ``found`` = ``used`` + the number of ``skipped``."""

    location: str
    found: int
    used: int
    height: int
    width: int
    channels: int
    sha256: str
    skipped: list[Skip]


@dataclass(frozen=True)
class SSCDFindings:
    """Similarity to the nearest training image, as Somepalli et al. (CVPR 2023) summarise it."""

    quantile_95: float
    above: Share


@dataclass(frozen=True)
class SetFindings:
    """What was found out about one set.

    Attributes:
        copies: images whose ratio, by the main measure, lies below the threshold.
        identical: images that equal a training image in every pixel.
        memorized_fraction: images with ``d1 / d2`` below the threshold, as published (near-duplicates not considered).
        memorized_quantity: for each published threshold the images whose ratio of nearest to mean lies below it.
        median_distance: median of the l2 distance to the nearest training image.
        average_minimum_distance: mean cosine distance to the training image nearest in direction; only of a network's
            features.
        sscd: of SSCD's descriptors the 95th percentile of the similarity to the nearest training image, and the share
            of images for which it lies above 0.5.
    """

    copies: Share
    identical: int
    memorized_fraction: Share
    memorized_quantity: dict[str, Share]
    median_distance: float
    average_minimum_distance: float | None
    sscd: SSCDFindings | None


@dataclass(frozen=True)
class CopiedImage:
    """A training image and the number of copies of it, with the names of the first few."""

    name: str
    index: int
    count: int
    copies: list[str]


@dataclass(frozen=True)
class DuplicateFacts:
    """Near-duplicates inside the training set; ``groups`` lists the names in the largest of them.

    ``among_copied`` is the share of the copies whose original has a near-duplicate, ``among_train`` that of all
    training images; ``features`` says what near-duplicates were found by.
    """

    features: str
    images: int
    groups_found: int
    groups: list[list[str]]
    among_train: Share
    among_copied: Share | None


@dataclass(frozen=True)
class Findings:
    """All figures of an audit.

    Attributes:
        settings: what was asked for.
        sets: what was looked at.
        measure: the main measure, ``"distinct"`` or ``"nearest"``, see :class:`~lightning_iet.audit.core.Copies`.
        generated: figures of the generated images.
        held_out: the same of the held-out images, if there are any.
        excess: how much larger the share of copies is among generated images.
        most_copied: training images with the most copies, first the one with most.
        originals: number of training images with at least one copy.
        duplicates: near-duplicates inside the training set, if they were looked for.
        membership: whether the generator's loss tells training images from others, if it was measured.
        versions: of the software.
    """

    settings: dict[str, Any]
    sets: dict[str, SetFacts]
    measure: str
    generated: SetFindings
    held_out: SetFindings | None
    excess: Excess | None
    most_copied: list[CopiedImage]
    originals: int
    duplicates: DuplicateFacts | None
    membership: Membership | None
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, numbers and strings, for JSON."""
        return {"kind": "audit", **_plain(asdict(self))}


def make_findings(
    audit: Audit, *, settings: Mapping[str, Any] | None = None, membership: Membership | None = None
) -> Findings:
    """Work out the figures of an audit.

    Args:
        audit: what was found.
        settings: further settings to put on record, such as the size that images were brought to.
        membership: what the generator's loss gives away, if it was measured.

    Returns:
        The figures.
    """
    ratio = audit.settings.ratio
    copies = audit.copies["generated"]
    measure = next(iter(copies.ratios))
    copied = below(copies.ratios[measure], ratio)
    originals = most_copied(copies.neighbors.indices[:, 0], copied)
    figures = {name: _set_findings(found, ratio, measure, audit.features.name) for name, found in audit.copies.items()}
    generated, held_out = figures["generated"], figures.get("held_out")
    return Findings(
        settings={"features": audit.features.name, "features_sha256": audit.features.sha256}
        | asdict(audit.settings)
        | dict(settings or {}),
        sets={name: _facts(images) for name, images in audit.sets.items()},
        measure=measure,
        generated=generated,
        held_out=held_out,
        excess=None if held_out is None else excess(generated.copies, held_out.copies),
        most_copied=[_copied(audit, index, places) for index, places in originals[:LISTED]],
        originals=len(originals),
        duplicates=None if audit.duplicates is None else _duplicates(audit.duplicates, audit.sets["train"], originals),
        membership=membership,
        versions={name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    )


def _set_findings(copies: Copies, ratio: float, measure: str, features: str) -> SetFindings:
    total = len(copies.identical)
    closeness = Closeness(copies.ratios["nearest"], copies.ratios["mean"], copies.neighbors.indices[:, 0])
    counts = closeness.count(limit=ratio)
    return SetFindings(
        copies=share(int(below(copies.ratios[measure], ratio).sum()), total),
        identical=int(copies.identical.sum()),
        memorized_fraction=share(counts.memorized, total),
        memorized_quantity={threshold: share(count, total) for threshold, count in counts.quantity.items()},
        median_distance=float(np.median(copies.neighbors.sq_distances[:, 0].sqrt().numpy())),
        average_minimum_distance=None if copies.cosine is None else float(copies.cosine.double().mean()),
        sscd=_sscd(1 - copies.cosine) if features == SSCD and copies.cosine is not None else None,
    )


def _sscd(similarities: Tensor) -> SSCDFindings:
    summary = similarity_summary(similarities)
    total = len(similarities)
    return SSCDFindings(float(summary["q0.95"]), share(round(float(summary["share"]) * total), total))


def _facts(images: ImageSet) -> SetFacts:
    channels, height, width = images.pixels.shape[1:]
    used, skipped = len(images), [Skip(printable(name), reason) for name, reason in images.skipped]
    location = printable(images.location)
    return SetFacts(location, used + len(skipped), used, height, width, channels, images.sha256, skipped)


def _copied(audit: Audit, index: int, places: list[int]) -> CopiedImage:
    names = [printable(audit.sets["generated"].names[place]) for place in places[:LISTED]]
    return CopiedImage(printable(audit.sets["train"].names[index]), index, len(places), names)


def _duplicates(found: Duplicates, train: ImageSet, originals: list[tuple[int, list[int]]]) -> DuplicateFacts:
    twins = torch.zeros(len(train), dtype=torch.bool)
    twins[[index for group in found.members for index in group]] = True
    copies = [(len(places), bool(twins[index])) for index, places in originals]
    total = sum(count for count, _ in copies)
    return DuplicateFacts(
        features=found.features,
        images=found.images,
        groups_found=len(found.members),
        groups=[[printable(train.names[index]) for index in group[:LISTED]] for group in found.members[:LISTED]],
        among_train=share(found.images, len(train)),
        among_copied=share(sum(count for count, twin in copies if twin), total) if total else None,
    )


def _plain(value: Any) -> Any:
    """Turn named tuples, which ``asdict`` leaves as they are, into dictionaries."""
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
