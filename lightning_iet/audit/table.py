"""The figures of an audit in the terminal."""

from rich.table import Table

from lightning_iet.audit.findings import Findings, SetFindings
from lightning_iet.audit.statistics import Share
from lightning_iet.audit.verdict import membership_words, percent, verdict

__all__ = ["findings_table", "rows"]


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
