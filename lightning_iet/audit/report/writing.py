"""Writes all files of a report into a folder."""

import json
from pathlib import Path

from lightning_iet.audit.core import Audit
from lightning_iet.audit.findings import Findings
from lightning_iet.audit.folders import METRICS, PAIRS, PAIRS_PICTURE, RATIOS_PICTURE, REPORT
from lightning_iet.audit.pairs import write_pairs
from lightning_iet.audit.report.histogram import ratio_figure
from lightning_iet.audit.report.page import render_page
from lightning_iet.audit.report.thumbnails import shrink
from lightning_iet.tools.figures import INK, nearest_pairs, save_figure

__all__ = ["write_report"]

DRAWN = 16  # pairs in the picture
DISTINCT = (
    "Generated images closest to a training image\n"
    "$d_1 / d_2$: distance to the nearest over the next, near-duplicates in the training set counted as one;"
    " below {:.2f} in colour"
)


def write_report(audit: Audit, findings: Findings, folder: Path, *, pairs: int = 100) -> None:
    """Write ``report.html``, ``pairs.csv``, ``metrics.json``, ``pairs.png`` and ``ratios.png``.

    Args:
        audit: what was found.
        findings: its figures.
        folder: an empty folder.
        pairs: generated images that the page shows.
    """
    (folder / METRICS).write_text(json.dumps(findings.as_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write_pairs(audit, folder / PAIRS)
    (folder / REPORT).write_text(render_page(audit, findings, pairs=pairs), encoding="utf-8")
    _pictures(audit, folder)


def _pictures(audit: Audit, folder: Path) -> None:
    copies, threshold = audit.copies["generated"], audit.settings.ratio
    measure, ratios = next(iter(copies.ratios.items()))
    lowest = ratios.sort(stable=True).indices[:DRAWN]
    nearest = copies.neighbors.indices[lowest, 0]
    generated, train = audit.sets["generated"].pixels[lowest], audit.sets["train"].pixels[nearest]
    figure = nearest_pairs(
        shrink(generated, 192) / 255,
        shrink(train, 192) / 255,
        ratios[lowest].tolist(),
        nearest.tolist(),
        limit=threshold,
    )
    if measure == "distinct":
        figure.suptitle(DISTINCT.format(threshold), color=INK, fontsize=9)
    save_figure(figure, folder / PAIRS_PICTURE)
    by_set = {name: found.ratios[measure] for name, found in audit.copies.items()}
    label = "distance to the nearest over that to the next training image, $d_1 / d_2$"
    save_figure(ratio_figure(by_set, threshold=threshold, label=label), folder / RATIOS_PICTURE)
