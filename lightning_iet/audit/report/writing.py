"""Write all files of a report into a folder."""

from pathlib import Path

from matplotlib.figure import Figure

from lightning_iet.audit.core import Audit
from lightning_iet.audit.findings import Findings
from lightning_iet.audit.pairs import write_pairs
from lightning_iet.audit.report.images import ratio_figure, shrink
from lightning_iet.audit.report.page import OF_LIMIT, PARTS_END, parts_of_limits, render_page
from lightning_iet.plots import nearest_pairs, save_figure
from lightning_iet.utilities.files import METRICS, PAIRS, PAIRS_PICTURE, RATIOS_PICTURE, REPORT, write_json

DRAWN = 16  # pairs in the picture
TITLE = (
    "Generated images that are the most like a training image\n"
    f"{OF_LIMIT}, as in report.html: below 1 an image is noticed, {PARTS_END:g} stands for more; "
    "in colour: named or noticed"
)
READING = (
    "The further left, the more an image looks like one training image and like no other. Left of the dashed line it "
    "is noticed. Copies are where generated images reach further left than held-out ones, which nobody copied."
)
LABEL = (
    f"{OF_LIMIT}, as in report.html: the lowest of all searches; last step: {PARTS_END:g} and more\n"
    "ratio: distance to the nearest over that to the next training image"
)


def write_report(audit: Audit, findings: Findings, folder: Path, *, pairs: int = 100, images: bool = True) -> None:
    """Write ``report.html``, ``pairs.csv``, ``metrics.json``, ``ratios.png`` and, with images, ``pairs.png``.

    Args:
        audit: what was found.
        findings: its figures.
        folder: an empty folder.
        pairs: generated images that the page shows.
        images: whether the page shows images, rather than names and figures only.
    """
    write_json(folder / METRICS, findings.as_dict())
    write_pairs(findings.pairs, folder / PAIRS)
    (folder / REPORT).write_text(render_page(audit, findings, pairs=pairs, images=images), encoding="utf-8")
    if images:
        save_figure(_nearest(audit, findings), folder / PAIRS_PICTURE)
    by_set = {name: parts_of_limits(audit, found) for name, found in audit.copies.items()}
    reading = READING if "held_out" in by_set else READING.rpartition(" Copies")[0]
    figure = ratio_figure(by_set, threshold=1.0, label=LABEL, end=PARTS_END, title=reading)
    save_figure(figure, folder / RATIOS_PICTURE)


def _nearest(audit: Audit, findings: Findings) -> Figure:
    rows = findings.pairs[:DRAWN]
    places, sources = ([row[name] for row in rows] for name in ("index", "source_index"))
    return nearest_pairs(
        shrink(audit.sets["generated"].pixels[places], 192) / 255,
        shrink(audit.sets["train"].pixels[sources], 192) / 255,
        parts_of_limits(audit, audit.copies["generated"])[places].tolist(),
        [row["source"] for row in rows],
        marked=[bool(row["named"] or row["noticed"]) for row in rows],
        label=OF_LIMIT,
        title=TITLE,
    )
