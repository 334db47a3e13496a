"""Writing a report: pairs.csv, metrics.json, pictures and the page."""

import csv
from pathlib import Path

from lightning_iet.audit.core import Audit
from lightning_iet.audit.findings import Findings
from lightning_iet.audit.report.images import ratio_figure, shrink
from lightning_iet.audit.report.page import render_page
from lightning_iet.audit.search import views
from lightning_iet.evaluation.memorization import below
from lightning_iet.plots import INK, nearest_pairs, save_figure
from lightning_iet.utilities.files import METRICS, PAIRS, PAIRS_PICTURE, RATIOS_PICTURE, REPORT, printable, write_json

_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # the wide ones count as well


def for_spreadsheets(name: str) -> str:
    """Write a name so that no spreadsheet takes it for a formula: with an apostrophe before it, where it needs one.

    Names that begin with an apostrophe get one as well, so that taking one away always gives the name.

    Args:
        name: any name.

    Returns:
        As :func:`printable`, safe in a cell.

    Example:
        >>> for_spreadsheets("=1+1.png"), for_spreadsheets("'.png"), for_spreadsheets("1.png")
        ("'=1+1.png", "''.png", '1.png')
    """
    shown = printable(name)
    return f"'{shown}" if shown.startswith((*_FORMULA, "'")) else shown


NEAREST = 5  # training images listed for each generated one


def write_pairs(audit: Audit, path: Path) -> None:
    """Write one row for each generated image, in their order.

    Columns: ``index`` and ``name`` of the image; its ratios by each measure; ``identical`` and ``copy``, 0 or 1;
    ``version`` that is nearest (mirrored or shifted, where that was looked for); then ``train_i``, ``train_index_i``
    and ``distance_i`` (l2, not squared) of the nearest training images. A name that a spreadsheet would take for a
    formula has an apostrophe before it, see :func:`~lightning_iet.audit.report.writing.for_spreadsheets`.

    Args:
        audit: what was found.
        path: the file.
    """
    copies = audit.copies["generated"]
    neighbors, measures = copies.neighbors, list(copies.ratios)
    count = min(NEAREST, neighbors.indices.shape[1])
    versions = list(views(audit.settings.invariance))
    names, train = audit.sets["generated"].names, [for_spreadsheets(name) for name in audit.sets["train"].names]
    ratios = [copies.ratios[measure].tolist() for measure in measures]
    copied = below(copies.ratios[measures[0]], audit.settings.ratio).tolist()
    distances, indices = neighbors.sq_distances[:, :count].sqrt().tolist(), neighbors.indices[:, :count].tolist()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        nearest = [f"{what}_{n + 1}" for n in range(count) for what in ("train", "train_index", "distance")]
        writer.writerow(["index", "name", *(f"ratio_{m}" for m in measures), "identical", "copy", "version", *nearest])
        for i, name in enumerate(names):
            flags = int(copies.identical[i]), int(copied[i]), versions[int(neighbors.views[i, 0])]
            pairs = zip(indices[i], distances[i], strict=True)
            found = [cell for j, distance in pairs for cell in (train[j], j, f"{distance:.7g}")]
            writer.writerow([i, for_spreadsheets(name), *(f"{ratio[i]:.7g}" for ratio in ratios), *flags, *found])


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
    write_json(folder / METRICS, findings.as_dict())
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
