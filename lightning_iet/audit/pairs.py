"""Pairs of generated images and the training images that they are the most like: rows for people and spreadsheets."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lightning_iet.audit.core import Audit, Copies
from lightning_iet.audit.evidence import Evidence, relative_ratios, without_pairs
from lightning_iet.audit.reading import ImageSet
from lightning_iet.audit.search import views
from lightning_iet.evaluation.memorization import below
from lightning_iet.utilities.files import printable
from lightning_iet.utilities.fingerprints import digest

NEAREST = 5  # training images listed for each generated one
_MARKED = tuple("=+-@＝＋－＠'")  # what spreadsheets take for a formula, the wide ones too, and the mark against it


def pair_rows(audit: Audit) -> list[dict[str, Any]]:
    """List every generated image with the training images that it is the most like, the nearest first.

    Returns:
        A row for each: ``index``, ``name`` and ``sha256`` of the image; ``score``, the ratio by the search that it
        is shown by, and ``search``, which one that is; ``named`` as a copy and ``noticed``, 0 or 1;
        ``beyond_held_out``, 1 if it is nearer than any held-out image, all searches taken together, else 0, and empty
        where there are none of more than one colour; ``noise``,
        the signal-to-noise ratio in dB once the disguise is undone, empty for scores above 0.5; ``source``,
        ``source_index`` and ``source_sha256`` of the training image; ``ratio_…`` by each published measure;
        ``identical`` and ``copy`` (by the published ratio); ``version`` that is nearest by plain distances; then
        ``train_i``, ``train_index_i`` and ``distance_i`` (l2, not squared) of the training images nearest by plain
        distances.
    """
    copies, generated, train = audit.copies["generated"], audit.sets["generated"], audit.sets["train"]
    neighbors, measures = copies.neighbors, list(copies.ratios)
    count = min(NEAREST, neighbors.indices.shape[1])
    versions = list(views(audit.settings.invariance))
    copied = below(copies.ratios[measures[0]], audit.settings.ratio).tolist()
    named, noticed = audit.evidence.named.tolist(), audit.evidence.noticed.tolist()
    beyond = audit.evidence.beyond.tolist() if audit.evidence.held_out_judged else None
    ratios = {measure: values.tolist() for measure, values in copies.ratios.items()}
    distances, indices = neighbors.sq_distances[:, :count].sqrt().tolist(), neighbors.indices[:, :count].tolist()
    scores, sources, noise = copies.scores.tolist(), copies.sources.tolist(), copies.noise.tolist()
    rows, searches = [], list(copies.matches)
    for i in _order(copies, audit.evidence):
        row: dict[str, Any] = {
            "index": i,
            "name": printable(generated.names[i]),
            "sha256": image_hash(generated, i),
            "score": scores[i],
            "search": searches[int(copies.search[i])],
            "named": int(named[i]),
            "noticed": int(noticed[i]),
            "beyond_held_out": "" if beyond is None else int(beyond[i]),
            "noise": "" if noise[i] != noise[i] else noise[i],
            "source": printable(train.names[sources[i]]),
            "source_index": sources[i],
            "source_sha256": image_hash(train, sources[i]),
        }
        row |= {f"ratio_{measure}": ratios[measure][i] for measure in measures}
        row |= {"identical": int(copies.identical[i]), "copy": int(copied[i])}
        row["version"] = versions[int(neighbors.views[i, 0])]
        for number, (j, distance) in enumerate(zip(indices[i], distances[i], strict=True), 1):
            row |= {
                f"train_{number}": printable(train.names[j]),
                f"train_index_{number}": j,
                f"distance_{number}": distance,
            }
        rows.append(row)
    return rows


def _order(copies: Copies, evidence: Evidence) -> list[int]:
    """Put named copies first, then what was noticed, what is nearer than any held-out image, and the rest.

    Each are in the order of the ratio as a part of its search's limit.

    Where no image is named but the scan speaks of copies, the images that it counts are first, by the ratio of its
    search.
    """
    relative = relative_ratios(copies.search_ratios, evidence.noticed_below)
    relative = relative.gather(1, copies.search[:, None])[:, 0]
    keys = [~evidence.named, ~evidence.noticed, ~evidence.beyond, relative, copies.scores]
    if evidence.scan is not None and evidence.decided_by_scan:
        ratios = copies.search_ratios[:, evidence.scan_search].double()
        counted = (ratios <= evidence.scan.threshold) & ~copies.blank
        if evidence.dismissed_pairs is not None:
            counted &= ~evidence.dismissed_pairs[:, evidence.scan_search]
        keys = [~counted, ratios.where(counted, 0), *keys]
    columns = zip(*(key.tolist() for key in keys), range(len(copies.scores)), strict=True)
    return [int(key[-1]) for key in sorted(columns)]


def write_pairs(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write ``pairs.csv``. A name that a spreadsheet would take for a formula gets an apostrophe before it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({name: _cell(name, value) for name, value in row.items()} for row in rows)


def image_hash(images: ImageSet, index: int) -> str:
    """Return the SHA-256 of the file that an image was read from, or of its pixels if it was never stored.

    The fourth page of a file of several has ``:4`` behind it: what a person decides of a page holds for it alone.
    """
    if images.hashes:
        return images.hashes[index]
    pixels = images.pixels[index].contiguous()
    return digest(*pixels.shape, pixels.numpy().tobytes())


def for_spreadsheets(name: str) -> str:
    """Write a name so that no spreadsheet takes it for a formula: with an apostrophe before it, where it needs one.

    Names that begin with an apostrophe get one as well, so that taking one away always gives the name.

    Returns:
        As :func:`printable`, safe in a cell.

    Example:
        >>> for_spreadsheets("=1+1.png"), for_spreadsheets("'.png"), for_spreadsheets("1.png")
        ("'=1+1.png", "''.png", '1.png')
    """
    shown = printable(name)
    return f"'{shown}" if shown.startswith(_MARKED) else shown


def _cell(name: str, value: object) -> object:
    if isinstance(value, float):
        return f"{value:.7g}"
    return for_spreadsheets(value) if isinstance(value, str) and name != "version" else value


# --- what a reviewer has decided --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Review:
    """Pairs that a person has looked at, by the hashes of the generated and the training image.

    Attributes:
        confirmed: Pairs that are copies.
        dismissed: Pairs that are none.
        names: By pair the names of its two images, where they are known.
    """

    confirmed: frozenset[tuple[str, str]] = field(default=frozenset())
    dismissed: frozenset[tuple[str, str]] = field(default=frozenset())
    names: Mapping[tuple[str, str], tuple[str, str]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of decisions."""
        return len(self.confirmed | self.dismissed)

    def as_list(self) -> list[dict[str, str]]:
        """Return the decisions as the page of a report saves them."""
        decided = [(pair, "confirmed") for pair in self.confirmed] + [(pair, "dismissed") for pair in self.dismissed]
        found = []
        for pair, decision in sorted(decided):
            name, source = map(printable, self.names.get(pair, ("", "")))
            found.append(dict(zip(_OF_DECISION, (name, pair[0], source, pair[1], decision), strict=True)))
        return found


_OF_DECISION = ("name", "sha256", "source", "source_sha256", "decision")
"""Keys of a decision in the file; without the names it is one as well."""


def read_review(path: Path) -> Review:
    """Read the file that the report's page saves.

    Args:
        path: A JSON file with a list ``"pairs"`` of objects with ``"sha256"``, ``"source_sha256"`` and ``"decision"``,
            ``"confirmed"`` or ``"dismissed"``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    wanted = "Argument `review` expected a file that was saved in the page of a report"
    if not path.is_file():
        raise FileNotFoundError(f"{wanted}, but got '{path}', which does not exist. Check its name.")
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))["pairs"]
        decided = {(pair["sha256"], pair["source_sha256"]): pair["decision"] for pair in pairs}
        names = {
            (pair["sha256"], pair["source_sha256"]): (str(pair.get("name", "")), str(pair.get("source", "")))
            for pair in pairs
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{wanted}, but got '{path}', which holds something else. Save it anew.") from error
    groups = {name: frozenset(pair for pair, found in decided.items() if found == name) for name in decided.values()}
    unknown = set(groups) - {"confirmed", "dismissed"}
    if unknown:
        raise ValueError(f"{wanted}, but got '{path}' with a decision {min(unknown)!r}. Save it anew.")
    return Review(groups.get("confirmed", frozenset()), groups.get("dismissed", frozenset()), names)


def apply_review(audit: Audit, review: Review) -> Audit:
    """Name the pairs that a person has confirmed, and no longer name, notice or count those that were dismissed.

    A decision is of the pair that an image is shown in, or of one that another search has found: what is confirmed is a
    copy by whatever search, and is shown by one that finds it. What is dismissed takes away the searches that have
    found this pair, and no others: an image that is named or noticed beside a training image that nobody has judged
    stays so, and is shown beside that one, see :func:`~lightning_iet.audit.evidence.without_pairs`.

    Images whose pairs were dismissed stay in the scan: the number of images that are judged is that of those drawn.

    Returns:
        The audit, with the review; with the number of its decisions that belong to no pair that was found, and that of
        dismissed pairs whose images stay named or noticed beside another training image.
    """
    copies = audit.copies["generated"]
    pairs = _decided_pairs(audit, review)
    is_confirmed, is_dismissed = torch.zeros(2, *copies.search_sources.shape, dtype=torch.bool)
    for place, pair in pairs.items():
        is_confirmed[place], is_dismissed[place] = pair in review.confirmed, pair not in review.confirmed
    left = without_pairs(audit.evidence, copies, audit.copies.get("held_out"), is_dismissed)
    confirmed = is_confirmed.any(dim=1)
    is_shown = is_confirmed.gather(1, left.search[:, None])[:, 0]
    search = torch.where(confirmed & ~is_shown, is_confirmed.int().argmax(dim=1), left.search)
    dismissed = is_dismissed.gather(1, search[:, None])[:, 0]
    decided = replace(
        left,
        sure=left.sure | confirmed,
        noticed=left.noticed | confirmed,
        search=search,
        confirmed=int(confirmed.sum()),
        sure_by_review=int((confirmed & ~left.sure).sum()),
        dismissed=dismissed,
    )
    shown_anew = dict(audit.copies) | {"generated": replace(copies, search=search)}
    stays = (decided.named | decided.noticed) & ~confirmed
    outweighed = {pair for place, pair in pairs.items() if is_dismissed[place] and stays[place[0]]}
    return replace(
        audit,
        copies=shown_anew,
        evidence=decided,
        review=review,
        unused_decisions=len(review) - len(set(pairs.values())),
        outweighed_decisions=len(outweighed),
    )


def _decided_pairs(audit: Audit, review: Review) -> dict[tuple[int, int], tuple[str, str]]:
    """Return the pairs of a review that some search has found, by the positions of the image and of the search."""
    decided = review.confirmed | review.dismissed
    images = {own for own, _ in decided}
    found: dict[tuple[int, int], tuple[str, str]] = {}
    for image, sources in enumerate(audit.copies["generated"].search_sources.tolist()):
        own = image_hash(audit.sets["generated"], image)
        if own in images:
            pairs = [(own, image_hash(audit.sets["train"], source)) for source in sources]
            found |= {(image, search): pair for search, pair in enumerate(pairs) if pair in decided}
    return found
