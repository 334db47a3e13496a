"""The figures of an audit in the terminal."""

from typing import NamedTuple

from rich.table import Table

from lightning_iet.audit.findings import Findings, SetFindings
from lightning_iet.audit.statistics import Excess, Share
from lightning_iet.evaluation.membership import Membership
from lightning_iet.utilities.text import percent

SIGNIFICANT = 0.01


class Verdict(NamedTuple):
    """An audit in words.

    Attributes:
        level: ``"copies"``, ``"control"`` (no more than held-out images), ``"none"`` or ``"open"`` (no control).
        headline: the answer.
        details: how sure it is.
    """

    level: str
    headline: str
    details: str


def verdict(findings: Findings) -> Verdict:
    """Say in plain words whether the generated images are copies.

    A rate counts as larger than that of held-out images if chance would give such a difference in fewer than one of a
    hundred audits *(our choice)*. Images that equal a training image in every pixel need no statistics, as long as no
    held-out image does.

    Args:
        findings: the figures.

    Returns:
        The verdict.
    """
    copies = findings.generated.copies
    control = None if findings.held_out is None else findings.held_out.copies
    counted = f"{copies.count:,} of {copies.total:,} generated images ({percent(copies.share)})"
    are = "is a copy" if copies.count == 1 else "are copies"
    if copies.count == 0:
        headline = f"No copies found among {copies.total:,} generated images."
        details = f"With 95 % confidence, fewer than {percent(copies.high)} of this generator's images are copies."
        return Verdict("none", headline, details + _control(control))
    if findings.excess is not None and findings.excess.p_value < SIGNIFICANT:
        headline = f"The generator copies: {counted} {are} of training images."
        return Verdict(
            "copies", headline, f"{_control(control).strip()} {_difference(findings.excess)}{_known(findings)}"
        )
    identical = findings.generated.identical
    same = (
        f"{identical:,} of {copies.total:,} generated images {'equals' if identical == 1 else 'equal'} a training image"
    )
    if identical and not (findings.held_out and findings.held_out.identical):
        headline = f"The generator copies: {same} in every pixel."
        return Verdict("copies", headline, f"In all, {counted} {are} by this measure.{_control(control)}")
    if identical and control is not None:
        headline = f"{same} in every pixel, but so do held-out images: they are no control."
        return Verdict("open", headline, f"In all, {counted} {are} by this measure.{_known(findings)}")
    if control is None:
        headline = f"{counted} {are} of training images by this measure."
        details = (
            "Without held-out images nobody can tell how many of them are chance: on data of low variety, "
            "even images that nobody copied lie close to a training image. Add --held-out."
        )
        return Verdict("open", headline, details)
    known = _known(findings)
    headline = f"No sure sign of copying: {counted} pass for {'a copy' if copies.count == 1 else 'copies'}."
    details = "The difference is within what chance gives; a few copies may hide in it, so look at the pairs."
    return Verdict("control", headline, f"{_control(control).strip()} {details}{known}")


def membership_words(membership: Membership) -> str:
    """Say in plain words whether the generator's loss tells training images from others.

    Args:
        membership: the figures.

    Returns:
        Two sentences.
    """
    answer = "tells training images from held-out ones"
    if membership.auc_low <= 0.5:
        answer = "gives no sure sign of which images were trained on"
    rates = membership.true_positive_rates.items()
    found = ", ".join(f"{percent(share)} at {percent(float(rate))}" for rate, share in rates)
    return (
        f"The generator's loss {answer}: AUC {membership.auc:.3f} (95 % interval {membership.auc_low:.3f} to "
        f"{membership.auc_high:.3f}; 0.5 is chance). Training images found at few false positives: {found}."
    )


def _difference(larger: Excess) -> str:
    difference, low, high = (100 * value for value in (larger.difference, larger.low, larger.high))
    return f"The share is larger by {difference:.2g} percentage points (95 % interval {low:.2g} to {high:.2g})."


def _known(findings: Findings) -> str:
    """Warn of held-out images that are training images."""
    found = findings.held_out.identical if findings.held_out else 0
    if not found:
        return ""
    these = "of them equals a training image" if found == 1 else "of them equal a training image"
    return (
        f" Beware: {found:,} {these} in every pixel. What was trained on is no control, and hides copies: remove such "
        "images from --held-out, and audit again."
    )


def _interval(part: Share) -> str:
    return f"{percent(part.share)}, 95 % interval {percent(part.low)} to {percent(part.high)}"


def _control(control: Share | None) -> str:
    if control is None:
        return ""
    return (
        f" Of {control.total:,} held-out images, which nobody copied, {control.count:,} ({_interval(control)}) "
        f"look{'s' if control.count == 1 else ''} the same way."
    )


def findings_table(findings: Findings) -> Table:
    """Lay out the counts of the generated images beside those of the held-out ones.

    Args:
        findings: the figures.

    Returns:
        A table for rich's console.
    """
    words = verdict(findings)
    details = words.details
    if findings.membership is not None:
        details += f"\n{membership_words(findings.membership)}"
    table = Table(title=words.headline, caption=details, title_justify="left", caption_justify="left")
    header, *body = rows(findings)
    for column, text in enumerate(header):
        table.add_column(text, justify="right" if column else "left")
    for cells in body:
        table.add_row(*cells)
    return table


def rows(findings: Findings) -> list[list[str]]:
    """Return a header and the lines of the table, as text."""
    sets = [findings.generated] + ([] if findings.held_out is None else [findings.held_out])
    ratio = f"{findings.settings['ratio']:.2g}"
    lines = [["", "generated", "held-out"][: len(sets) + 1]]
    lines.append(["images", *(f"{part.copies.total:,}" for part in sets)])
    if findings.measure == "distinct":
        lines.append([f"copies: d1/d2 < {ratio}, near-duplicates counted once", *(_cell(part.copies) for part in sets)])
    lines.append([f"d1/d2 < {ratio} (memorized fraction)", *(_cell(part.memorized_fraction) for part in sets)])
    for threshold in ("0.15", "0.3"):
        shares = (_cell(part.memorized_quantity[threshold]) for part in sets)
        lines.append([f"D1/mean of {findings.settings['k']} < {threshold} (memorized quantity)", *shares])
    lines.append(["identical in every pixel", *(f"{part.identical:,}" for part in sets)])
    lines.append(["median distance to the nearest training image", *(f"{part.median_distance:.4g}" for part in sets)])
    return lines + _directions(sets)


def _directions(sets: list[SetFindings]) -> list[list[str]]:
    """Lines about features that are compared by their angle, where there are any."""
    lines = []
    distances = [part.average_minimum_distance for part in sets if part.average_minimum_distance is not None]
    if distances:
        lines.append(["average minimum cosine distance (AMD)", *(f"{distance:.4g}" for distance in distances)])
    similar = [part.sscd for part in sets if part.sscd is not None]
    if similar:
        lines.append(["SSCD similarity, 95th percentile", *(f"{part.quantile_95:.3f}" for part in similar)])
        lines.append(["SSCD similarity > 0.5", *(_cell(part.above) for part in similar)])
    return lines


def _cell(part: Share) -> str:
    return f"{part.count:,} ({percent(part.share)})"
