"""Writes all files of a search into its folder."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from lightning_iet.plots import save_figure
from lightning_iet.search.report.page import front_figures, render_page
from lightning_iet.search.selection_points import Point, SelectionSearch, labels, write_points
from lightning_iet.utilities.files import write_atomically

WriteMask: TypeAlias = Callable[[Path, str, Mapping[str, Any]], object]

POINTS, FRONT, CHOSEN, REPORT, MASKS = "points.csv", "front.png", "chosen.json", "report.html", "masks"


def write_search(search: SelectionSearch, folder: Path, *, write_mask: WriteMask | None = None) -> None:
    """Write ``points.csv``, ``front.png``, ``masks/*.json``, ``chosen.json`` and ``report.html``.

    Args:
        search: what was found.
        folder: of the search.
        write_mask: writes a mask to a path, with where it comes from; by default as JSON with the groups' names.
    """
    write = write_mask or _plain_writer(search)
    write_points(search, folder / POINTS)
    figures = front_figures(search)
    for number, figure in enumerate(figures):
        save_figure(figure, folder / (FRONT if number == 0 else f"front-{number + 1}.png"))
    unfinished = folder / f".{MASKS}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for number, point in enumerate((p for p in search.front if p.candidate.kind == "mask"), 1):
        write(unfinished / f"{number:02d}.json", point.candidate.mask, source(search, point))
    shutil.rmtree(folder / MASKS, ignore_errors=True)
    unfinished.rename(folder / MASKS)
    if search.choice is not None:
        point, choice = search.choice
        write(folder / CHOSEN, point.candidate.mask, {**source(search, point), "rule": choice.rule})
    with write_atomically(folder / REPORT) as path:
        path.write_text(render_page(search), encoding="utf-8")


def source(search: SelectionSearch, point: Point) -> dict[str, Any]:
    """Where a mask comes from: its trial, and what it was judged by."""
    return {
        "trial": point.candidate.name,
        "learning_rate": point.candidate.learning_rate,
        "step": point.step,
        "objectives": dict(zip(labels(search), point.values, strict=True)),
        "controls": dict(zip(labels(search), search.controls, strict=True)),
        "share": point.share,
        "settings": dict(search.settings),
    }


def _plain_writer(search: SelectionSearch) -> WriteMask:
    """Writes a mask of groups whose network is not known."""

    def write(path: Path, mask: str, origin: Mapping[str, Any]) -> None:
        bits = {name: int(bit) for name, bit in zip(search.groups, mask, strict=True)}
        content = {"groups": list(search.groups), "mask": bits, "source": origin}
        with write_atomically(path) as unfinished:
            unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    return write
