"""Write all files of a report into a folder."""

from pathlib import Path

from matplotlib.figure import Figure

from lightning_iet.audit.core import Audit
from lightning_iet.audit.findings import Findings
from lightning_iet.audit.pairs import write_pairs
from lightning_iet.audit.report.images import ratio_figure, shrink
from lightning_iet.audit.report.page import render_page
from lightning_iet.plots import INK, nearest_pairs, save_figure
from lightning_iet.utilities.files import METRICS, PAIRS, PAIRS_PICTURE, RATIOS_PICTURE, REPORT, write_json

DRAWN = 16  # pairs in the picture
TITLE = (
    "Generated images that are the most like a training image\n"
    "ratio of the distance to the nearest over that to the next, by the most telling search; below {:.2f} in colour"
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
    by_set = {name: found.scores for name, found in audit.copies.items()}
    label = "distance to the nearest over that to the next training image, by the most telling search"
    figure = ratio_figure(by_set, threshold=float(audit.evidence.noticed_below.max()), label=label)
    save_figure(figure, folder / RATIOS_PICTURE)


def _nearest(audit: Audit, findings: Findings) -> Figure:
    limit = float(audit.evidence.noticed_below.max())
    rows = findings.pairs[:DRAWN]
    places, sources = ([row[name] for row in rows] for name in ("index", "source_index"))
    figure = nearest_pairs(
        shrink(audit.sets["generated"].pixels[places], 192) / 255,
        shrink(audit.sets["train"].pixels[sources], 192) / 255,
        [row["score"] for row in rows],
        [row["source"] for row in rows],
        limit=limit,
    )
    figure.suptitle(TITLE.format(limit), color=INK, fontsize=9)
    return figure
