"""``pairs.csv``: every generated image with its nearest training images."""

import csv
from pathlib import Path

from lightning_iet.audit.core import Audit
from lightning_iet.audit.findings import below
from lightning_iet.audit.naming import for_spreadsheets
from lightning_iet.audit.views import views

__all__ = ["write_pairs"]

NEAREST = 5  # training images listed for each generated one


def write_pairs(audit: Audit, path: Path) -> None:
    """Write one row for each generated image, in their order.

    Columns: ``index`` and ``name`` of the image; its ratios by each measure; ``identical`` and ``copy``, 0 or 1;
    ``version`` that is nearest (mirrored or shifted, where that was looked for); then ``train_i``, ``train_index_i``
    and ``distance_i`` (l2, not squared) of the nearest training images. A name that a spreadsheet would take for a
    formula has an apostrophe before it, see :func:`~lightning_iet.audit.naming.for_spreadsheets`.

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
