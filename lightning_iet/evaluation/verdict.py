"""What an evaluation says of a model, in one sentence."""

from collections.abc import Mapping, Sequence
from math import isfinite, sqrt
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

SIGNIFICANT = 0.01  # p-value below which two shares differ by more than chance
NEAR = 0.1  # at most this share of held-out images counts as unusually near to a training image
HARDLY_ANY = 0.02  # largest share of the generated images of which it is said that hardly any are copies
MORE = 1.25  # times the share of the held-out images, and one image: beyond it copies are not as many as of these
FEW = 100  # images, fewer of which do not bear out that nothing is memorised
FEWEST = 10  # images, fewer of which bear nothing out


def copies_exceed(share: float, control: float, num_images: int) -> bool:
    """Tell whether a checkpoint or a run copies too much to be chosen; one image more than held-out ones is allowed.

    Args:
        share: of the generated images that pass for copies.
        control: likewise, of the held-out images.
        num_images: number of generated images.

    Example:
        >>> copies_exceed(1 / 400, 0.0, 400), copies_exceed(2 / 400, 0.0, 400)
        (False, True)
    """
    return round((share - control) * num_images, 6) > 1  # 8/10 is more than 7/10 + 1/10 in floating point


class Counts(NamedTuple):
    """How many of the generated and of the held-out images have some property.

    Attributes:
        generated: Number of generated images that have it.
        num_generated: Number of all.
        control: Number of held-out images that have it.
        num_control: Number of all.
    """

    generated: int
    num_generated: int
    control: int
    num_control: int

    @property
    def is_higher(self) -> bool:
        """Whether the generated images have a larger share, by more than chance (Fisher's exact test, one-sided)."""
        return self.p_value("greater") < SIGNIFICANT

    @property
    def is_lower(self) -> bool:
        """Whether their share is smaller, by more than chance."""
        return self.p_value("less") < SIGNIFICANT

    def p_value(self, alternative: Literal["greater", "less"]) -> float:
        """Return the probability of such a share, or a larger (smaller) one, if both sets were alike."""
        from scipy.stats import fisher_exact  # half a second, which a table of old runs does not need

        table = [
            [self.generated, self.num_generated - self.generated],
            [self.control, self.num_control - self.control],
        ]
        return float(fisher_exact(table, alternative=alternative).pvalue)

    @property
    def exceeds(self) -> bool:
        """Whether the share of the generated images is larger than chance alone would often make it: ``MORE``.

        Example:
            >>> Counts(20, 400, 18, 400).exceeds, Counts(1, 400, 0, 400).exceeds, Counts(12, 16, 0, 4).exceeds
            (False, False, True)
        """
        return self.generated > MORE * self.control * self.num_generated / self.num_control + 1

    @property
    def words(self) -> str:
        """Both shares for people.

        Example:
            >>> Counts(360, 512, 50, 512).words
            '360 of 512 images (of held-out images 50)'
            >>> Counts(360, 512, 5, 40).words
            '360 of 512 images (of held-out images 5 of 40)'
        """
        of = "" if self.num_control == self.num_generated else f" of {self.num_control:,}"
        return f"{self.generated:,} of {self.num_generated:,} images (of held-out images {self.control:,}{of})"


def verdict(report: Mapping[str, Any]) -> str:
    """Say in a sentence whether a model copies or memorises its training images, or draws nothing like them.

    *(our choice)* It copies where more generated images than held-out ones pass for copies, by more than chance gives
    in one of a hundred cases. Else memorization is likely where more of them stand unusually near to one training image
    (MQ, at the largest threshold that at most a tenth of held-out images reach), or where the loss tells training
    images from others. It draws nothing like the data where not half as many images as held-out ones are near to the
    training images, at the threshold that about half of these reach.

    There is no sign of memorization only where copies exceed the share of the held-out images by no more than a quarter
    and one image: where a test finds nothing because the images are few, the sentence says so. Where more than a tenth
    of the held-out images pass for copies, or more than half lie near at the smallest threshold, they are
    near-duplicates of training images, and tell nothing of what a model draws without copying.

    Example:
        >>> part = {"num_images": 512, "memorized_fraction": 0.0, "further": {}}
        >>> generated, control = part | {"mq": {"0.15": 360 / 512}}, part | {"mq": {"0.15": 50 / 512}}
        >>> verdict({"generated": generated, "control": control})
        'Hardly any exact copies (0 of 512), but 360 of 512 images (of held-out images 50) stand unusually near to ...
    """
    generated, control = report["generated"], report["control"]
    copies, others = (part.get("copied_fraction", part["memorized_fraction"]) for part in (generated, control))
    copied = _counts(report, copies, others)
    level = near_threshold(control["mq"])
    near = _mq_counts(report, level)
    usual = _mq_counts(report, min(control["mq"], key=lambda level: abs(control["mq"][level] - 0.5)))
    membership = _membership(report)
    is_hardly_any = copied.generated <= HARDLY_ANY * copied.num_generated
    if copied.is_higher:
        says = f"The model copies training images: {copied.words} pass for copies."
    elif near.is_higher:
        says = f"{_before(copied)} {near.words} stand unusually near to one training image: memorization is likely."
    elif copied.num_control >= FEWEST and (others > NEAR or control["mq"][level] > 0.5):
        held_out = f"{max(copied.control, near.control):,} of {copied.num_control:,} held-out images"
        says = (
            f"No verdict is possible: {held_out} are near-duplicates of training images. Split the data so that such "
            f"images stay together; {copied.words} pass for copies."
        )
    elif (
        is_hardly_any
        and usual.is_lower
        and usual.generated * usual.num_control < usual.control * usual.num_generated / 2
    ):
        return (
            f"The model draws nothing like the data: {usual.words} lie near to the training images. Few copies of such "
            "a model say nothing; train it longer."
        )
    elif membership:
        return f"{_before(copied)} {membership}: memorization is likely."
    elif copied.exceeds:
        return f"{copied.words} pass for copies: the images are too few to tell this from chance."
    elif min(copied.num_generated, copied.num_control) < FEWEST:
        return f"Too few images for a verdict: {copied.words} pass for copies."
    elif usual.is_lower:
        return (
            f"{_before(copied)} the images are less like the training images than held-out ones are: a model that has "
            "learnt little copies little."
        )
    elif copied.num_generated < FEW or copied.num_control < FEW:
        fewest = min(copied.num_generated, copied.num_control)
        few = f"but {fewest:,} images are too few to rule it out"
        return f"No sign of memorization, {few}: {copied.words} pass for copies."
    else:
        return f"No sign of memorization: {copied.words} pass for copies."
    return f"{says[:-1]}; {membership}." if membership else says


def _before(copied: Counts) -> str:
    """Begin a sentence with the copies that a test has not told from chance."""
    if copied.generated <= HARDLY_ANY * copied.num_generated:
        return f"Hardly any exact copies ({copied.generated:,} of {copied.num_generated:,}), but"
    if copied.exceeds:
        return f"{copied.words} pass for copies, which may be chance, and"
    of = "" if copied.num_control == copied.num_generated else f" of {copied.num_control:,}"
    same = f"about as many as of held-out images ({copied.control:,}{of})"
    return f"{copied.generated:,} of {copied.num_generated:,} images pass for copies, {same}, and"


def near_threshold(control: Mapping[str, float]) -> str:
    """Return the largest threshold of MQ that at most a tenth of the held-out images reach, or else the smallest.

    Args:
        control: Shares of held-out images by threshold.

    Example:
        >>> near_threshold({"0.15": 0.02, "0.2": 0.08, "0.3": 0.4}), near_threshold({"0.15": 0.2, "0.2": 0.3})
        ('0.2', '0.15')
    """
    levels = sorted(control, key=float)
    return max((level for level in levels if control[level] <= NEAR), key=float, default=levels[0])


def telling_thresholds(generated: Mapping[str, float], control: Mapping[str, float]) -> list[str]:
    """Return the three thresholds of MQ about :func:`near_threshold`, without those that nearly all or no images reach.

    Args:
        generated: Shares of generated images by threshold.
        control: Shares of held-out images.

    Example:
        >>> telling_thresholds({"0.1": 0.0, "0.2": 0.3, "0.3": 0.5, "0.4": 0.7, "0.5": 1.0, "0.6": 1.0},
        ...                    {"0.1": 0.0, "0.2": 0.0, "0.3": 0.1, "0.4": 0.4, "0.5": 0.8, "0.6": 1.0})
        ['0.2', '0.3', '0.4']
    """
    levels = sorted(control, key=float)
    telling = [
        level
        for level in levels
        if max(generated[level], control[level]) > 0 and min(generated[level], control[level]) < 0.99
    ]
    centre = levels.index(near_threshold(control))
    return sorted(sorted(telling, key=lambda level: abs(levels.index(level) - centre))[:3], key=float)


def fid_note(report: Mapping[str, Any]) -> str:
    """Say that an FID means little where there are no more images than features; empty where there are.

    The covariance of N images has at most N - 1 directions, and the distance is then mostly that of chance.

    Example:
        >>> fid_note({"settings": {"feature_dimensions": 2048}, "generated": {"num_images": 512},
        ...           "data": {"num_reference": 1221}})
        'FID means little here: 512 images are no more than the 2,048 dimensions of its features.'
    """
    dimensions = report["settings"].get("feature_dimensions")
    fewest = min(report["generated"]["num_images"], report["data"]["num_reference"])
    if dimensions is None or fewest > dimensions:
        return ""
    return f"FID means little here: {fewest:,} images are no more than the {dimensions:,} dimensions of its features."


def loss_tells(auc: float, low: float, *, members: int, others: int) -> bool:
    """Tell whether the loss tells training images from others, by more than chance and a tenth of the way.

    The interval of a perfect separation has no width, however few the images. So the rank test of Mann and Whitney has
    to agree at 1 %, in its normal approximation.

    Args:
        auc: how often a training image has a lower loss than another one.
        low: lower end of its interval.
        members: number of training images whose loss was measured.
        others: likewise, of others.

    Example:
        >>> loss_tells(0.6, 0.55, members=500, others=500), loss_tells(1.0, 1.0, members=3, others=3)
        (True, False)
    """
    if not (isfinite(auc) and low > 0.5 and auc >= 0.55):
        return False
    deviation = sqrt((members + others + 1) / (12 * members * others))  # of the AUC, where the loss tells nothing
    return NormalDist().cdf((0.5 - auc) / deviation) < SIGNIFICANT


def _membership(report: Mapping[str, Any]) -> str:
    """Say that the loss tells training images from others, where it does.

    The attack takes at most 512 images of a set; a report holds the number of the control images that were compared
    with generated ones, which is no larger.
    """
    further = report["generated"]["further"]
    auc, low = (further.get(f"membership_inference_auc{end}") for end in ("", "_low"))
    if auc is None or low is None:
        return ""
    members, others = (min(number, 512) for number in (report["data"]["num_train"], report["control"]["num_images"]))
    if not loss_tells(auc, low, members=members, others=others):
        return ""
    return f"the loss tells training images from others (AUC {auc:.2f}; 0.5 is chance)"


def _mq_counts(report: Mapping[str, Any], level: str) -> Counts:
    return _counts(report, *(report[part]["mq"][level] for part in ("generated", "control")))


def _counts(report: Mapping[str, Any], *shares: float) -> Counts:
    numbers: Sequence[int] = [report[part]["num_images"] for part in ("generated", "control")]
    first, second = (round(share * number) for share, number in zip(shares, numbers, strict=True))
    return Counts(first, numbers[0], second, numbers[1])
