"""Write all files of a report into a folder."""

from pathlib import Path

from matplotlib.figure import Figure

from lightning_iet.audit.core import Audit
from lightning_iet.audit.findings import Findings
from lightning_iet.audit.pairs import write_pairs
from lightning_iet.audit.report.images import ratio_figure, shrink
from lightning_iet.audit.report.page import PARTS_END, parts_of_limits, render_page
from lightning_iet.plots import INK, nearest_pairs, save_figure
from lightning_iet.utilities.files import METRICS, PAIRS, PAIRS_PICTURE, RATIOS_PICTURE, REPORT, write_json

DRAWN = 16  # pairs in the picture
TITLE = (
    "Generated images that are the most like a training image\n"
    "distance to the nearest over that to the next, by the most telling search; in colour: named or noticed"
)
LABEL = (
    "distance to the nearest over that to the next training image, as a part of the limit of its search:\n"
    f"the lowest of all searches, below 1 an image is noticed; {PARTS_END:g} and more in the last step"
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
    save_figure(ratio_figure(by_set, threshold=1.0, label=LABEL, end=PARTS_END), folder / RATIOS_PICTURE)


def _nearest(audit: Audit, findings: Findings) -> Figure:
    rows = findings.pairs[:DRAWN]
    places, sources = ([row[name] for row in rows] for name in ("index", "source_index"))
    figure = nearest_pairs(
        shrink(audit.sets["generated"].pixels[places], 192) / 255,
        shrink(audit.sets["train"].pixels[sources], 192) / 255,
        [row["score"] for row in rows],
        [row["source"] for row in rows],
        marked=[bool(row["named"] or row["noticed"]) for row in rows],
    )
    figure.suptitle(TITLE, color=INK, fontsize=9)
    return figure
