"""The figures of an audit, plain numbers and words only: what goes into ``metrics.json``, the table and the report."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_iet.audit.cache import gather
from lightning_iet.audit.comparability import (
    Difference,
    compare_distances,
    compare_sets,
    explained_by_noise,
    unvaried,
    with_refused,
)
from lightning_iet.audit.core import Audit, Copies, most_copied
from lightning_iet.audit.evidence import Evidence, is_noticed, to_judge
from lightning_iet.audit.features import SSCD
from lightning_iet.audit.pairs import pair_rows
from lightning_iet.audit.reading import ImageSet, Origin
from lightning_iet.audit.statistics import (
    Excess,
    Nearer,
    Share,
    excess,
    fewer_than,
    least_share,
    nearer_distances,
    nearer_share,
    share,
)
from lightning_iet.data.samples import Skip
from lightning_iet.evaluation.membership import Membership
from lightning_iet.evaluation.memorization import Closeness, below
from lightning_iet.functional.copy_tests import Scan, held_out_needed
from lightning_iet.functional.duplicates import Duplicates
from lightning_iet.functional.sscd_similarity import similarity_summary
from lightning_iet.utilities.files import printable

if TYPE_CHECKING:
    from lightning_iet.audit.verdict import Verdict

PACKAGES = ("lightning-iet", "torch", "numpy", "pillow")
LISTED = 100  # groups of duplicates and training images copied most that are listed by name


@dataclass(frozen=True)
class SetFacts:
    """What a set of images consists of. ``found`` = ``used`` + the number of ``skipped``.

    ``one_colour`` counts the images that show one colour only, ``repeated`` those others that equal an earlier one.
    ``left_alone`` says what other files lie beside them; ``beside`` counts by suffix those that may hold images.
    """

    location: str
    found: int
    used: int
    height: int
    width: int
    channels: int
    sha256: str
    skipped: list[Skip]
    origin: Origin
    one_colour: int
    repeated: int
    left_alone: str = ""
    beside: dict[str, int] = field(default_factory=dict)


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
        identical: images that equal a training image in every pixel, and show more than one colour.
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

    ``among_copied`` is the share of the images of :func:`counted_as_copies` whose original has a near-duplicate,
    ``among_train`` that of all training images; ``features`` says what near-duplicates were found by.
    """

    features: str
    images: int
    groups_found: int
    groups: list[list[str]]
    among_train: Share
    among_copied: Share | None


@dataclass(frozen=True)
class EvidenceFindings:
    """What the scores of the generated images say; see :class:`~lightning_iet.audit.evidence.Evidence`.

    Attributes:
        named: generated images that are named as copies; where the comparison with held-out images is doubted, only
            ``sure`` ones count, see :func:`~lightning_iet.audit.verdict.counted`.
        sure: those that need no statistics.
        sure_by_review: of these the ones that only a person has confirmed.
        discovered: those that are named by comparison with held-out images.
        named_by_number: of those named, the ones that would not be noticed one by one: they are named since so many
            images lie so near to a training image, but so few held-out ones do.
        named_by_pixels: of those named, the others that would not be noticed by their ratio: they equal a training
            image once the disguise is undone.
        by_search: named images by what they are: ``"identical"``, or the search that found them.
        sure_by_search: likewise, of those that are sure.
        noticed: images below ``noticed_below`` by any search, where an innocent one seldom lies.
        noticed_below: by search, the ratio.
        held_out_noticed: held-out images below it; ``None`` without held-out images.
        judged: generated images that the tests judge: of more than one colour, and equal ones once.
        held_out_judged: held-out images likewise; ``None`` without held-out images.
        held_out_alike: held-out images as near as the least near of those discovered; ``None`` likewise.
        passing: generated images of more than one colour that pass for copies by the main published measure, without
            those that a person has dismissed; of what is left equal ones once.
        held_out_passing: held-out images likewise; ``None`` without held-out images.
        beyond: generated images that are less likely than every held-out image, all searches taken together.
        beyond_judged: those of them that the tests judge: equal ones once.
        scan: the test of whether the generator copies; ``None`` without held-out images.
        scan_search: the search that says it the most clearly.
        held_out_needed: held-out images that would decide whether those noticed are copies; ``None`` if there are
            none, or all of them are named.
        false_finds: the expected share of innocent images among those discovered.
        confirmed: images that a person has confirmed in a review.
        dismissed: images that a person has dismissed: neither named nor noticed, whatever their ratio.
    """

    named: Share
    sure: int
    sure_by_review: int
    discovered: int
    named_by_number: int
    named_by_pixels: int
    by_search: dict[str, int]
    sure_by_search: dict[str, int]
    noticed: Share
    noticed_below: dict[str, float]
    held_out_noticed: int | None
    judged: int
    held_out_judged: int | None
    held_out_alike: int | None
    passing: int
    held_out_passing: int | None
    beyond: int
    beyond_judged: int
    scan: Scan | None
    scan_search: str
    held_out_needed: int | None
    false_finds: float
    confirmed: int
    dismissed: int


@dataclass(frozen=True)
class PlantedFindings:
    """How well copies of one kind that the audit planted itself were found; ``least`` is the lower limit of the share.

    A copy is found if it is noticed as generated images are, and the search names its original.
    """

    kind: str
    found: int
    planted: int
    least: float


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
        most_copied: training images with the most copies, see :func:`counted_as_copies`, first the one with most.
        originals: number of training images with at least one copy.
        duplicates: near-duplicates inside the training set, if they were looked for.
        membership: whether the generator's loss tells training images from others, if it was measured.
        evidence: what the scores of the generated images say.
        planted: how well copies were found that the audit planted itself.
        not_moved: why moved copies were not looked for; empty if they were.
        not_degraded: likewise, of degraded copies.
        fewer_than: with 95 % confidence, the share of the generator's images that are copies of the kinds that were
            found, is less; it allows for copies that are not found, and speaks of images that can be read. ``None``
            where images were noticed, where nothing is decided, and where the generator copies.
        differences: properties in which generated images differ from training images, or lie farther from them than
            held-out images do.
        nearer: measures in which generated images lie nearer to training images than held-out images do, by more than
            chance.
        title: the title that the user gave the audit.
        date: when it was made, ISO 8601.
        command: the command that was given, or ``""``.
        versions: of the software.
        pairs: every generated image with its nearest training images, as
            :func:`~lightning_iet.audit.pairs.pair_rows`; ``pandas.DataFrame`` takes them as they are.
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
    evidence: EvidenceFindings
    planted: list[PlantedFindings]
    not_moved: str
    not_degraded: str
    fewer_than: float | None
    differences: list[Difference]
    nearer: list[Nearer]
    title: str
    date: str
    command: str
    versions: dict[str, str]

    pairs: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, numbers and strings, for JSON; pairs are in a file of their own."""
        answer = self.verdict
        words = {name: getattr(answer, name) for name in ("level", "headline", "details")}
        figures = _plain(asdict(replace(self, pairs=[])))
        del figures["pairs"]
        return {"kind": "audit", "verdict": words, **figures}

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures as plain dictionaries, as in ``metrics.json``."""
        return self.as_dict()

    @property
    def verdict(self) -> "Verdict":
        """The answer in words."""
        from lightning_iet.audit.verdict import verdict

        return verdict(self)

    @property
    def exit_status(self) -> int:
        """Status of the command: 0, or with ``--fail-on-copies`` 3 for copies and 4 where nothing is decided."""
        allowed = self.settings.get("fail_on_copies", False)
        if allowed is False:
            return 0
        from lightning_iet.audit.verdict import counted

        level, evidence = self.verdict.level, self.evidence
        share_of_copies = counted(self).share
        if level == "copies" and not evidence.named.count and evidence.scan is not None and self.held_out is not None:
            scan = evidence.scan
            share_of_copies = scan.generated / evidence.judged - scan.held_out / max(1, evidence.held_out_judged or 0)
        if level == "copies" and (allowed is True or share_of_copies > allowed):
            return 3
        return 4 if level == "open" else 0


def make_findings(
    audit: Audit,
    *,
    settings: Mapping[str, Any] | None = None,
    membership: Membership | None = None,
    title: str = "",
    command: str = "",
    refused: Mapping[str, str] | None = None,
) -> Findings:
    """Work out the figures of an audit.

    Args:
        audit: what was found.
        settings: further settings to put on record, such as the size that images were brought to.
        membership: what the generator's loss gives away, if it was measured.
        title: a title to put on record.
        command: the command to put on record.
        refused: by option that this command does not take, what to do instead, see
            :func:`~lightning_iet.audit.comparability.with_refused`.

    Returns:
        The figures.
    """
    ratio = audit.settings.ratio
    measure = next(iter(audit.copies["generated"].ratios))
    figures = {name: _set_findings(found, ratio, measure, audit.features.name) for name, found in audit.copies.items()}
    generated, held_out = figures["generated"], figures.get("held_out")
    planted = judge_planted(audit)
    evidence = _evidence(audit)
    found = Findings(
        settings={"features": audit.features.name, "features_sha256": audit.features.sha256}
        | asdict(audit.settings)
        | dict(settings or {}),
        sets={name: _facts(images) for name, images in audit.sets.items()},
        measure=measure,
        generated=generated,
        held_out=held_out,
        excess=None if held_out is None else excess(generated.copies, held_out.copies),
        **_lists(audit),
        membership=membership,
        evidence=evidence,
        planted=planted,
        not_moved=audit.not_moved,
        not_degraded=audit.not_degraded,
        fewer_than=_fewer_than(evidence, planted),
        differences=explained_by_noise(
            [with_refused(part, refused or {}) for part in compare_sets(audit.sets) + _farther(audit)]
        ),
        nearer=_nearer(audit),
        title=printable(title),
        date=gather(_now())[0],  # the same on every process
        command=printable(command),
        versions={name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    )
    kept = without_doubted(audit, found)
    if kept is not audit:
        found = replace(found, **_lists(kept))
    return found if found.verdict.level in ("none", "control") else replace(found, fewer_than=None)


def without_doubted(audit: Audit, findings: Findings) -> Audit:
    """Leave out the images that are named by comparison with held-out images alone, where that is doubted.

    Returns:
        The audit, whose evidence names those that :func:`~lightning_iet.audit.verdict.counted` counts.
    """
    from lightning_iet.audit.verdict import counted

    if counted(findings) == findings.evidence.named:
        return audit
    none = torch.zeros_like(audit.evidence.discovered)
    return replace(audit, evidence=replace(audit.evidence, discovered=none))


def _lists(audit: Audit) -> dict[str, Any]:
    """Work out what lists images by name."""
    originals = most_copied(audit.copies["generated"].sources, counted_as_copies(audit))
    duplicates = None if audit.duplicates is None else _duplicates(audit.duplicates, audit.sets["train"], originals)
    return {
        "most_copied": [_copied(audit, index, places) for index, places in originals[:LISTED]],
        "originals": len(originals),
        "duplicates": duplicates,
        "pairs": pair_rows(audit),
    }


def counted_as_copies(audit: Audit) -> Tensor:
    """Tell which generated images are listed with their originals.

    Returns:
        Those that are named, or pass for copies by the main published measure, and that nobody has dismissed, bool,
        shape ``(Q,)``.
    """
    main = next(iter(audit.copies["generated"].ratios.values()))
    return _not_dismissed(below(main, audit.settings.ratio), audit.evidence) | audit.evidence.named


def _not_dismissed(passing: Tensor, evidence: Evidence) -> Tensor:
    """Leave out dismissed images, and those whose pair by plain distances was dismissed."""
    if evidence.dismissed is None or evidence.dismissed_pairs is None:
        return passing
    return passing & ~evidence.dismissed & ~evidence.dismissed_pairs[:, 0]


def _passing(copies: Copies, ratio: float, evidence: Evidence | None = None) -> int:
    """Count images that pass for copies by the main published measure: of more than one colour, and equal ones once.

    Decisions are of files, so that of equal images some may be dismissed: they count while one is left.
    """
    passing = below(next(iter(copies.ratios.values())), ratio) & ~copies.blank
    return len(copies.content[passing if evidence is None else _not_dismissed(passing, evidence)].unique())


def _now() -> str:
    """Return the time, or the one that the variable SOURCE_DATE_EPOCH fixes for builds that can be repeated."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.fromtimestamp(int(fixed), UTC) if fixed else datetime.now(UTC)
    return now.isoformat(timespec="seconds")


def _evidence(audit: Audit) -> EvidenceFindings:
    evidence, copies, held_out = audit.evidence, audit.copies["generated"], audit.copies.get("held_out")
    total = len(copies.scores)
    noticed, named = int(evidence.noticed.sum()), evidence.named
    unnamed = int((evidence.noticed & ~named).sum())
    ratio = audit.settings.ratio
    judged, noticed_once = int(evidence.judged.sum()), int((evidence.noticed & evidence.judged).sum())
    return EvidenceFindings(
        named=share(int(named.sum()), total),
        sure=int(evidence.sure.sum()),
        sure_by_review=evidence.sure_by_review,
        discovered=int(evidence.discovered.sum()),
        named_by_number=int((evidence.discovered & ~evidence.sure & ~evidence.noticed).sum()),
        named_by_pixels=int((evidence.sure & ~evidence.noticed).sum()),
        by_search=_by_search(copies, named),
        sure_by_search=_by_search(copies, evidence.sure),
        noticed=share(noticed, total),
        noticed_below=dict(zip(copies.matches, evidence.noticed_below.tolist(), strict=True)),
        held_out_noticed=None
        if held_out is None
        else int((is_noticed(held_out.search_ratios, evidence.noticed_below) & ~held_out.blank).sum()),
        judged=judged,
        held_out_judged=None if held_out is None else evidence.held_out_judged,
        held_out_alike=None if held_out is None else evidence.held_out_alike,
        passing=_passing(copies, ratio, evidence),
        held_out_passing=None if held_out is None else _passing(held_out, ratio),
        beyond=int(evidence.beyond.sum()),
        beyond_judged=int((evidence.beyond & evidence.judged).sum()),
        scan=evidence.scan,
        scan_search=list(copies.matches)[evidence.scan_search],
        held_out_needed=held_out_needed(noticed_once, judged, level=audit.settings.false_finds)
        if unnamed and noticed_once
        else None,
        false_finds=audit.settings.false_finds,
        confirmed=evidence.confirmed,
        dismissed=0 if evidence.dismissed is None else int(evidence.dismissed.sum()),
    )


def _by_search(copies: Copies, which: Tensor) -> dict[str, int]:
    kinds = {"identical": int((which & copies.identical).sum())}
    for number, name in enumerate(copies.matches):
        kinds[name] = int((which & ~copies.identical & (copies.search == number)).sum())
    return kinds


def judge_planted(audit: Audit) -> list[PlantedFindings]:
    """Count the planted copies that were found: noticed, and traced back to their original or to an equal image.

    Returns:
        By kind, in the order in which they were planted.
    """
    copies, planted, train = audit.planted_copies, audit.planted, audit.sets["train"].pixels
    traced = copies.sources == planted.sources
    traced |= (train[copies.sources] == train[planted.sources]).flatten(1).all(dim=1)
    if audit.duplicates is not None:
        traced |= audit.duplicates.group[copies.sources] == audit.duplicates.group[planted.sources]
    found = (traced & is_noticed(copies.search_ratios, audit.evidence.noticed_below)).tolist()
    findings = []
    for kind in dict.fromkeys(planted.kinds):
        own = [hit for hit, other in zip(found, planted.kinds, strict=True) if other == kind]
        findings.append(PlantedFindings(kind, sum(own), len(own), least_share(sum(own), len(own))))
    return findings


def claimed(planted: Sequence[PlantedFindings]) -> list[PlantedFindings]:
    """Kinds of copies of which at least half were found: only these the audit claims to find."""
    return [part for part in planted if 2 * part.found >= part.planted]


def _fewer_than(evidence: EvidenceFindings, planted: Sequence[PlantedFindings]) -> float | None:
    kinds = claimed(planted)
    if evidence.noticed.count or not kinds:
        return None
    return min(1.0, fewer_than(evidence.noticed.total) / min(part.least for part in kinds))


def _nearer(audit: Audit) -> list[Nearer]:
    """Compare generated with held-out images by published measures: those that the tests judge, equal ones once."""
    if "held_out" not in audit.copies:
        return []
    judged = {name: to_judge(audit.copies[name]) for name in ("generated", "held_out")}
    if not all(bool(which.any()) for which in judged.values()):
        return []
    counts, distances = [], []
    for name, which in judged.items():
        copies = audit.copies[name]
        distances.append(copies.neighbors.sq_distances[which, 0].sqrt())
        nearest = copies.neighbors.indices[which, 0]
        closeness = Closeness(copies.ratios["nearest"][which], copies.ratios["mean"][which], nearest)
        quantity = closeness.count(limit=audit.settings.ratio).quantity
        counts.append({threshold: share(count, int(which.sum())) for threshold, count in quantity.items()})
    pairs = [nearer_share(f"memorized quantity at {a}", counts[0][a], counts[1][a]) for a in ("0.15", "0.3")]
    found = [*pairs, nearer_distances("median distance to the nearest training image", *distances)]
    return [part for part in found if part is not None]


def _farther(audit: Audit) -> list[Difference]:
    if "held_out" not in audit.copies:
        return []
    return compare_distances(
        *(audit.copies[name].neighbors.sq_distances[:, 0].sqrt() for name in ("generated", "held_out"))
    )


def _set_findings(copies: Copies, ratio: float, measure: str, features: str) -> SetFindings:
    total = len(copies.identical)
    closeness = Closeness(copies.ratios["nearest"], copies.ratios["mean"], copies.neighbors.indices[:, 0])
    counts = closeness.count(limit=ratio)
    return SetFindings(
        copies=share(int(below(copies.ratios[measure], ratio).sum()), total),
        identical=int((copies.identical & ~copies.blank).sum()),
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
    skipped = [Skip(printable(name), reason) for name, reason in images.skipped]
    one_colour, repeated = unvaried(images)
    return SetFacts(
        location=printable(images.location), found=len(images) + len(skipped), used=len(images),
        height=height, width=width, channels=channels, sha256=images.sha256, skipped=skipped, origin=images.origin,
        one_colour=one_colour, repeated=repeated, left_alone=images.left_alone, beside=dict(images.beside),
    )  # fmt: skip


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
