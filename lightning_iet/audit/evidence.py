"""What the scores of generated images say beside those of held-out images: whether it copies, and which are copies."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_iet.audit.comparability import first_of
from lightning_iet.evaluation.verdict import SIGNIFICANT
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
NOTICEABLE = 0.05  # probability that an audit of innocent images has one that is noticed
LEAST_NOISE = 35.0  # dB; copies that differ by less are sure ones, if no held-out image comes near
UNLIKE = 0.1  # of an image's own variance, by which a sure copy may differ: nearly black images are alike by themselves
NEARER = 3.0  # times than every held-out image
NEAR = 0.1  # sqrt(1 - c²) of a sure copy, where there are no held-out images
LARGEST_SURE = 1 / 3  # ratio of a sure copy
# Ratios below which an image is noticed where there are none, by search: at 8 x 8 pixels innocent images come nearer to
# one another.
WITHOUT_CONTROL = {"plain": 1 / 3, "recoloured": 1 / 3, "degraded": 1 / 6, "moved": 1 / 3}


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the scores say.

    Attributes:
        sure: Generated images that are copies without any statistics, bool, shape ``(Q,)``.
        discovered: Those that are named by comparison with held-out images, bool, shape ``(Q,)``.
        noticed: Those so near to a training image that an innocent one seldom is, bool, shape ``(Q,)``.
        noticed_below: By each search the ratio below which an image is noticed, shape ``(S,)``.
        beyond: Generated images that are less likely than every held-out image, all searches taken together, bool,
            shape ``(Q,)``.
        search: By which search each image is shown, int64, shape ``(Q,)``, see :func:`weigh`.
        judged: Generated images that the tests judge, bool, shape ``(Q,)``, see :func:`to_judge`.
        held_out_judged: Number of held-out images likewise; 0 without held-out images.
        scan: The test of whether the generator copies, by the search that says it the most clearly; its p-value allows
            for their number. ``None`` without held-out images.
        scan_search: The position of that search.
        held_out_alike: Held-out images as near to a training image as the least near of those discovered.
        confirmed: Images that a person has confirmed as copies in a review.
        sure_by_review: Of these the ones that are sure copies for no other reason.
        dismissed: Those that a person has dismissed, bool, shape ``(Q,)``: the pair that they are shown in was, and no
            other search names or notices them. ``None`` without a review.
        dismissed_pairs: Whether the pair that each search has found was dismissed, bool, shape ``(Q, S)``; likewise.
    """

    sure: Tensor
    discovered: Tensor
    noticed: Tensor
    noticed_below: Tensor
    beyond: Tensor
    search: Tensor
    judged: Tensor
    scan: Scan | None
    held_out_judged: int = 0
    scan_search: int = 0
    held_out_alike: int = 0
    confirmed: int = 0
    sure_by_review: int = 0
    dismissed: Tensor | None = None
    dismissed_pairs: Tensor | None = None

    @property
    def named(self) -> Tensor:
        """Generated images that are named as copies."""
        return self.sure | self.discovered

    @property
    def decided_by_scan(self) -> bool:
        """Whether no image is named, but the scan says that the generator copies."""
        return self.scan is not None and self.scan.p_value < SIGNIFICANT and not bool(self.named.any())


def weigh(generated: "Copies", held_out: "Copies | None", *, level: float) -> Evidence:
    """Judge generated images by their scores, and by those of held-out images that went through the same searches.

    *Sure* copies need no statistics: in one of the searches they equal a training image in every pixel, or nearly so
    once the disguise is undone (more than 35 dB, an error below a tenth of the image's own variance, and a ratio below
    1/3), and are at least three times nearer than every held-out image; without held-out images their ratio has to be
    below that search's limit, and their distance below 0.1.

    Images of one colour show nothing that could be copied: they are neither named nor noticed, nor are they a control.
    The tests judge equal images once, generated and held-out ones alike (:func:`to_judge`); what they say of an image
    holds for those that equal it.

    *Discovered* are those that the procedure of Benjamini and Hochberg names by conformal p-values, as long as the
    ratio that is the least likely is at most 0.5. Each search is calibrated by its own held-out ratios: where one comes
    near to innocent images too, as registration does among skies and walls, this takes nothing from the others.

    The *scan* looks at all thresholds up to 0.5 *(our choice: above it a blurred or noisy generator differs from real
    images without copying any)*, in each search by itself; the least p-value is multiplied by the number of searches
    (Bonferroni), so that no dependence among them can make it too small.

    *Noticed* are images that are so by any search, see :func:`noticeable`.

    An image is *shown* by one search: a sure copy by the first in which it is one; a discovered one by the search that
    names it, or by an earlier one that notices it beside the same training image; any other as
    :func:`telling_searches` says. Where nothing is named but the scan speaks of copies, the images that it counts are
    shown by its search.

    Args:
        generated: What the searches found of the generated images.
        held_out: Likewise, of the held-out images.
        level: The share of false finds among discovered images.
    """
    ratios, none = generated.search_ratios, torch.zeros_like(generated.blank)
    judged = to_judge(generated)
    control = None if held_out is None else held_out.search_ratios[to_judge(held_out)]
    if held_out is None or control is None or not len(control):
        below = without_control(generated.matches)
        sure = _sure(generated, held_out, below)
        search = _first(sure, telling_searches(generated, None, below))
        noticed = is_noticed(ratios, below) & ~generated.blank
        return Evidence(sure.any(dim=1), none, noticed, below, none, search, judged, None)
    first = first_of(generated.content)

    def of_all(part: Tensor, *, others: int) -> Tensor:
        """Give equal images what was found of the one that was judged, and images of one colour another value."""
        whole = torch.full((len(first),), others, dtype=part.dtype)
        whole[judged] = part
        return whole[first]

    discovered, ranks, naming = discover(ratios[judged], control, level=level)
    discovered, naming = of_all(discovered, others=False), of_all(naming, others=0)
    ranks = of_all(ranks, others=torch.iinfo(torch.int64).max)  # behind all others
    below = noticeable(control, max(1, int(judged.sum())))
    sure = _sure(generated, held_out, below)
    scan, scan_search = scan_searches(ratios[judged], control)
    alike = int(ranks[discovered].max()) - 1 if discovered.any() else 0
    search = _first(sure, _shown_by(generated, naming, below, discovered))
    if scan.p_value < SIGNIFICANT and not (sure.any() or discovered.any()):  # decided by the scan
        search = torch.where(ratios[:, scan_search].double() <= scan.threshold, scan_search, search)
    noticed = is_noticed(ratios, below) & ~generated.blank
    return Evidence(
        sure.any(dim=1),
        discovered,
        noticed,
        below,
        ranks == 1,
        search,
        judged,
        scan,
        held_out_judged=len(control),
        scan_search=scan_search,
        held_out_alike=alike,
    )


def _sure(generated: "Copies", held_out: "Copies | None", below: Tensor) -> Tensor:
    """Tell by which searches each image is a sure copy, as :func:`weigh` says.

    Args:
        generated: What the searches found of ``Q`` images.
        held_out: Likewise, of held-out images.
        below: By each search the ratio below which an image is noticed, shape ``(S,)``.

    Returns:
        Bool, shape ``(Q, S)``.
    """
    ratios, distances = generated.search_ratios, generated.search_distances
    identical, varied = generated.identical[:, None], ~generated.blank[:, None]
    error = 255**2 * 10 ** (-generated.search_noise / 10)
    undone = (generated.search_noise > LEAST_NOISE) & (error <= UNLIKE * generated.variance[:, None])
    nearly = identical | (undone & (ratios < LARGEST_SURE))
    if held_out is None or held_out.blank.all():
        is_plain = torch.tensor([name == "plain" for name in generated.matches])
        sure = varied & nearly & (ratios < below) & (is_plain | (distances < NEAR))
        sure[:, 0] |= (identical & varied)[:, 0] & ~sure.any(dim=1)  # its distance is 0, whatever the next one's
        return sure
    least = held_out.search_distances[~held_out.blank].amin(dim=0)
    # An identical image is at distance 0: surely a copy, unless a held-out image is as near.
    contaminated = (held_out.identical & ~held_out.blank).any()
    return varied & nearly & (distances * NEARER <= least) & (least > 0) & ~contaminated


def without_pairs(evidence: Evidence, generated: "Copies", held_out: "Copies | None", dismissed: Tensor) -> Evidence:
    """Judge images without the pairs that a person has dismissed, by the pairs that other searches have found.

    All limits stay as they are, and so does what is said of other images: to dismiss a pair takes no name from another
    image, nor from its own one a name that another search gives. In the scan an image counts as far from all training
    images by a search whose pair was dismissed.

    Args:
        evidence: What the scores say.
        generated: What the searches found of ``Q`` images.
        held_out: Likewise, of held-out images.
        dismissed: Whether the pair that each search has found was dismissed, bool, shape ``(Q, S)``.

    Returns:
        The evidence. An image that is shown in a dismissed pair is shown by a search that still names or notices it, or
        that the scan counts it by; if there is none, as before, and it is dismissed.
    """
    changed = dismissed.any(dim=1)
    left = replace(
        generated,
        search_ratios=generated.search_ratios.masked_fill(dismissed, 1.0),
        search_distances=generated.search_distances.masked_fill(dismissed, torch.inf),
        identical=generated.identical & ~dismissed[:, 0],  # to the training image that the plain search has found
    )
    below, judged = evidence.noticed_below, evidence.judged
    sure = _sure(left, held_out, below)
    discovered, beyond, unusual = evidence.discovered.clone(), evidence.beyond.clone(), evidence.search.clone()
    scan, scan_search = evidence.scan, evidence.scan_search
    if held_out is not None and evidence.held_out_judged and changed.any():
        control = held_out.search_ratios[to_judge(held_out)]
        unusual[changed] = _ranked(generated.search_ratios[changed], control)[2]
        # The ratios of all searches take part in a rank: only where the search that gives it has lost its pair, anew.
        again = changed & dismissed.gather(1, unusual[:, None])[:, 0]
        _, ranks, unusual[again] = _ranked(left.search_ratios[again], control)
        discovered[again] &= ranks <= evidence.held_out_alike + 1
        beyond[again] &= ranks == 1
        scan, scan_search = scan_searches(left.search_ratios[judged], control)
    found = replace(
        evidence,
        sure=evidence.sure & (sure.any(dim=1) | ~changed),
        discovered=discovered,
        noticed=evidence.noticed & (is_noticed(left.search_ratios, below) | ~changed),
        beyond=beyond,
        scan=scan,
        scan_search=scan_search,
    )
    telling = _first(sure, _shown_by(left, unusual, below, discovered))
    is_told = found.named | found.noticed
    if found.scan is not None and found.decided_by_scan:
        by_scan = (left.search_ratios[:, scan_search].double() <= found.scan.threshold) & ~left.blank & ~is_told
        telling, is_told = torch.where(by_scan, scan_search, telling), is_told | by_scan
    was_shown = dismissed.gather(1, evidence.search[:, None])[:, 0]
    search = torch.where(was_shown & is_told, telling, evidence.search)
    gone = dismissed.gather(1, search[:, None])[:, 0]
    return replace(found, search=search, beyond=beyond & ~gone, dismissed=gone, dismissed_pairs=dismissed)


def to_judge(images: "Copies") -> Tensor:
    """Tell which images the tests judge: each that shows more than one colour, and of equal ones the first.

    A generator that draws one image again and again says as much by it as if it drew it once.

    Args:
        images: What the searches found of ``Q`` images.

    Returns:
        Bool, shape ``(Q,)``.
    """
    return (first_of(images.content) == torch.arange(len(images.content))) & ~images.blank


def discover(ratios: Tensor, held_out: Tensor, *, level: float) -> tuple[Tensor, Tensor, Tensor]:
    """Name images by conformal p-values and the procedure of Benjamini and Hochberg.

    Args:
        ratios: By each search, shape ``(m, S)``.
        held_out: Likewise, shape ``(n, S)``.
        level: The share of false finds.

    Returns:
        Which are named, bool; the rank of each among the held-out images, 1 for those that are less likely than all of
        them, ``n + 1`` where the ratio is above 0.5; and the search that says so; shape ``(m,)`` each.
    """
    p_values, ranks, naming = _ranked(ratios, held_out)
    return false_discoveries(p_values, level=level), ranks, naming


def _ranked(ratios: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return p-values, 1 where the ratio is above 0.5, ranks among the held-out images, and searches."""
    p_values, naming = combined_p_values(ratios, held_out)
    too_large = ratios.gather(1, naming[:, None])[:, 0] > LARGEST
    p_values = p_values.masked_fill(too_large, 1.0)
    # A conformal p-value is a rank: (1 + number of held-out images as near) / (n + 1).
    ranks = (p_values * (len(held_out) + 1)).round().long()
    return p_values, ranks, naming


def telling_searches(images: "Copies", held_out: "Copies | None", below: Tensor) -> Tensor:
    """Choose of each image the search that says the most of it.

    That is the first search that notices it beside the training image that the most unusual ratio belongs to, or else
    the first that notices it at all: a mirrored copy is as near at 8 x 8 pixels, but not because it is blurred. Of an
    image that no search notices, it is that of the most unusual ratio.

    Args:
        images: What the searches found of ``Q`` images.
        held_out: Likewise, of held-out images: what is unusual is what they say
            (:func:`~lightning_iet.functional.copy_tests.combined_p_values`); without them, by the part of its limit.
        below: By each search the ratio below which an image is noticed, shape ``(S,)``.

    Returns:
        Positions of searches, int64, shape ``(Q,)``.
    """
    control = None if held_out is None else held_out.search_ratios[to_judge(held_out)]
    if control is None or not len(control):
        unusual = relative_ratios(images.search_ratios, below).min(dim=1).indices
    else:
        unusual = combined_p_values(images.search_ratios, control).searches
    return _shown_by(images, unusual, below, torch.zeros_like(images.blank))


def _shown_by(images: "Copies", unusual: Tensor, below: Tensor, fixed: Tensor) -> Tensor:
    """Choose the search that each image is shown by.

    The first that notices it beside the training image that ``unusual`` has found; or else the first that notices it at
    all, unless it is ``fixed``; or else ``unusual``.
    """
    sources, noticing = images.search_sources, images.search_ratios < below
    same = sources == sources.gather(1, unusual[:, None])
    return _first(noticing & same, torch.where(fixed, unusual, _first(noticing, unusual)))


def _first(which: Tensor, otherwise: Tensor) -> Tensor:
    """Return the position of the first ``True`` in each row, and where there is none another one."""
    return torch.where(which.any(dim=1), which.int().argmax(dim=1), otherwise)


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


def without_control(searches: Iterable[str]) -> Tensor:
    """Return the ratios below which an image is noticed where there are no held-out images, by name of the search.

    Example:
        >>> without_control(["plain", "moved"])
        tensor([0.3333, 0.3333])
    """
    return torch.tensor([WITHOUT_CONTROL[name] for name in searches])


def is_noticed(ratios: Tensor, below: Tensor) -> Tensor:
    """Tell which images lie below the limit of any search, shape ``(Q, S)`` and ``(S,)`` to ``(Q,)``."""
    return (ratios < below).any(dim=1)


def relative_ratios(ratios: Tensor, below: Tensor) -> Tensor:
    """Divide ratios by the limits of their searches: below 1 an image is noticed.

    Args:
        ratios: Shape ``(Q, S)``.
        below: Shape ``(S,)``, at least 0.

    Returns:
        Shape ``(Q, S)``; infinite in a search whose limit is 0, for it notices nothing.

    Example:
        >>> relative_ratios(torch.tensor([[0.2, 0.0], [0.4, 1.0]]), torch.tensor([0.4, 0.0]))
        tensor([[0.5000,    inf],
                [1.0000,    inf]])
    """
    return torch.where(below > 0, ratios / below, torch.inf)


def scan_searches(generated: Tensor, held_out: Tensor) -> tuple[Scan, int]:
    """Test by each search whether the generator copies, and return the clearest answer.

    Args:
        generated: Ratios by each search, shape ``(m, S)``.
        held_out: Likewise, shape ``(n, S)``.

    Returns:
        The scan, its p-value multiplied by the number of searches in which any ratio is at most 0.5; and which it is.
        Where there are no generated images it says nothing.
    """
    if not len(generated):
        return Scan(float("nan"), 0, 0, 1.0), 0
    pairs = zip(generated.unbind(dim=1), held_out.unbind(dim=1), strict=True)
    scans = [scan_test(*pair, largest=LARGEST) for pair in pairs]
    best = min(range(len(scans)), key=lambda number: scans[number].p_value)
    # Labels can be exchanged whatever the pooled ratios are: to count by these keeps the p-value valid.
    count = sum(bool((torch.cat(pair) <= LARGEST).any()) for pair in zip(generated.T, held_out.T, strict=True))
    return scans[best]._replace(p_value=min(1.0, max(count, 1) * scans[best].p_value)), best
