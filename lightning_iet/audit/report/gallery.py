"""The pictures of the report: pairs, training images copied most, groups of duplicates."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_iet.audit.copies import most_copied
from lightning_iet.audit.core import Audit
from lightning_iet.audit.findings import Findings, below
from lightning_iet.audit.report.thumbnails import data_uri
from lightning_iet.audit.verdict import percent
from lightning_iet.audit.views import views
from lightning_iet.utilities.naming import printable

__all__ = ["cards", "duplicate_groups", "originals"]

ORIGINALS, GROUPS, STRIP = 24, 24, 6  # training images copied most, groups of duplicates, images in a row


def cards(audit: Audit, *, pairs: int) -> list[dict[str, Any]]:
    """Describe the generated images with the lowest ratios by any measure, in the order of the main one.

    Args:
        audit: what was found.
        pairs: images for each measure.

    Returns:
        What the template needs of each pair.
    """
    ratios = audit.copies["generated"].ratios
    main = next(iter(ratios.values()))
    lowest = torch.cat([values.sort(stable=True).indices[:pairs] for values in ratios.values()]).unique()
    return [_card(audit, index) for index in lowest[main[lowest].sort(stable=True).indices].tolist()]


def originals(audit: Audit) -> list[dict[str, Any]]:
    """Describe the training images with the most copies, each before the first of its copies.

    Args:
        audit: what was found.

    Returns:
        What the template needs of each.
    """
    generated, train, copies = audit.sets["generated"], audit.sets["train"], audit.copies["generated"]
    copied = below(next(iter(copies.ratios.values())), audit.settings.ratio)
    found = most_copied(copies.neighbors.indices[:, 0], copied)[:ORIGINALS]
    return [
        {
            "count": f"{len(places):,}",
            "name": printable(train.names[index]),
            "images": [_image(train.pixels[index], f"Training image {printable(train.names[index])}")]
            + [
                _image(generated.pixels[place], f"Generated image {printable(generated.names[place])}")
                for place in places[: STRIP - 1]
            ],
        }
        for index, places in found
    ]


def duplicate_groups(audit: Audit, findings: Findings) -> dict[str, Any] | None:
    """Describe the largest groups of near-duplicates inside the training set.

    Args:
        audit: what was found.
        findings: its figures.

    Returns:
        What the template needs, or ``None`` if they were not looked for.
    """
    if audit.duplicates is None or findings.duplicates is None:
        return None
    train, facts = audit.sets["train"], findings.duplicates
    summary = (
        f"{facts.images:,} of {facts.among_train.total:,} training images ({percent(facts.among_train.share)}) have a "
        f"near-duplicate, in {facts.groups_found:,} {'group' if facts.groups_found == 1 else 'groups'}."
    )
    if facts.features != audit.features.name:
        summary += f" They were looked for in {facts.features}: {audit.features.name} tells classes apart, not images."
    if facts.among_copied is not None:
        summary += f" Of the copies, {percent(facts.among_copied.share)} are copies of such images."
    return {
        "summary": summary,
        "groups_found": facts.groups_found,
        "groups": [_group(train.pixels, train.names, group) for group in audit.duplicates.members[:GROUPS]],
    }


def _card(audit: Audit, index: int) -> dict[str, Any]:
    generated, train, copies = audit.sets["generated"], audit.sets["train"], audit.copies["generated"]
    nearest = int(copies.neighbors.indices[index, 0])
    distance = float(copies.neighbors.sq_distances[index, 0].sqrt())
    version = list(views(audit.settings.invariance))[int(copies.neighbors.views[index, 0])]
    remark = "identical" if copies.identical[index] else f"distance {distance:.3g}"
    ratios = {name: float(values[index]) for name, values in copies.ratios.items()}
    return {
        "index": index,
        "train_index": nearest,
        "name": printable(generated.names[index]),
        "train": printable(train.names[nearest]),
        "image": data_uri(generated.pixels[index]),
        "train_image": data_uri(train.pixels[nearest]),
        "distance": distance,
        "ratios": ratios,
        "ratio": next(iter(ratios.values())),
        "remark": remark if version == "as it is" else f"{version}, {remark}",
    }


def _group(pixels: Tensor, names: Sequence[str], group: list[int]) -> dict[str, Any]:
    shown = group[:STRIP]
    listed = ", ".join(printable(names[index]) for index in shown)
    return {
        "count": f"{len(group):,}",
        "names": listed if len(shown) == len(group) else f"{listed}, …",
        "images": [_image(pixels[index], f"Training image {printable(names[index])}") for index in shown],
    }


def _image(pixels: Tensor, text: str) -> dict[str, str]:
    return {"data": data_uri(pixels, largest=128), "text": text}
