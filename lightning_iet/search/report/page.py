"""``report.html``: one file that is complete in itself."""

import io
import re
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

import lightning_iet
from lightning_iet.plots import CONTROL, GENERATED, INK, QUIET, effect_bars, selection_front
from lightning_iet.search.report.findings import (
    effect_rows,
    effects,
    failed_rows,
    front_rows,
    interval,
    number,
    verdict,
)
from lightning_iet.search.selection_points import Point, SelectionSearch, described, duration, labels
from lightning_iet.utilities.pages import page_environment, read_resource, stylesheet

_PACKAGE = "lightning_iet.search.report"

# Colours of the figures, as the page calls them; what is not named here is the same by day and by night.
_COLOURS = {
    GENERATED: "var(--generated)", CONTROL: "var(--control)", INK: "var(--ink)", QUIET: "var(--quiet)",
    "#e6e6e6": "var(--line)", "#ffffff": "none", "#5b7f3a": "var(--family)",
}  # fmt: skip


def render_page(search: SelectionSearch) -> str:
    """Write the report of a search.

    Every name is escaped; the page holds no script, and a content security policy lets it load nothing.

    Args:
        search: what was found.

    Returns:
        HTML.
    """
    template = page_environment().from_string(read_resource(_PACKAGE, "report.html.j2"))
    fronts = [
        {"label": label, "svg": _svg(figure)}
        for label, figure in zip(labels(search)[1:], front_figures(search), strict=True)
    ]
    found = effects(search)
    known = bool(found) and any(part.effect.isfinite().any() for part in found.values())
    return template.render(
        css=Markup(stylesheet(_PACKAGE)),  # noqa: S704 (our own file)
        verdict=verdict(search),
        quality=labels(search)[0],
        fronts=fronts,
        front=front_rows(search),
        groups=search.groups,
        masks=[_mask(search, point) for point in search.front if point.candidate.kind == "mask"],
        effects=_svg(effect_figure(search)) if known else "",
        effect_rows=effect_rows(search) if found else [],
        joint=all(part.joint for part in found.values()),
        freedom=min((part.degrees_of_freedom for part in found.values()), default=0),
        labels=labels(search),
        points=[_point(search, point) for point in search.all_points],
        failures=failed_rows(search),
        running=search.running,
        controls=[
            (label, number(control))
            for label, control in zip(labels(search), search.controls, strict=True)
            if control is not None
        ],
        settings=[(name, str(value)) for name, value in search.settings.items()],
        counts=_counts(search),
        version=lightning_iet.__version__,
    )


def front_figures(search: SelectionSearch) -> list[Figure]:
    """Draw the front, one figure for each objective of memorization against the first objective."""
    names, points = labels(search), search.points
    courses = {
        "plain fine-tuning": search.course(kind="plain"),
        "the whole family": search.course(kind="mask", mask="1" * len(search.groups)),
        "the pretrained network": search.course(kind="pretrained"),
    }
    chosen = search.choice[0] if search.choice else None
    figures = []
    for index, objective in enumerate(search.objectives[1:], 1):

        def at(point: Point, column: int = index) -> tuple[float, float]:
            return point.values[0], point.values[column]

        sides = ["left" if search.objectives[0].direction == "minimize" else "right"]
        sides.insert(0, "lower" if objective.direction == "minimize" else "upper")
        figures.append(
            selection_front(
                [at(point) for point in points],
                [at(point) for point in search.front],
                courses={
                    name: [list(map(at, course)) for course in trials.values()]
                    for name, trials in courses.items()
                    if trials
                },
                chosen=None if chosen is None else at(chosen),
                controls=(search.controls[0], search.controls[index]),
                labels=(names[0], names[index]),
                titles=("Memorization against quality", f"{' '.join(sides)} is better"),
            )
        )
    return figures


def effect_figure(search: SelectionSearch) -> Figure:
    """Draw the effect of each bit on each objective, with 95 % intervals."""
    parts = {label: (part.effect.tolist(), interval(part)) for label, part in effects(search).items()}
    return effect_bars(search.groups, parts, note="Effect of training a group")


def _svg(figure: Figure) -> Markup:
    """A figure as a part of the page, in the page's colours and letters."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightning-iet"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))
    for colour, name in _COLOURS.items():
        text = text.replace(colour, name)
    return Markup(text)  # noqa: S704 (matplotlib escapes the names of groups)


def _mask(search: SelectionSearch, point: Point) -> dict[str, Any]:
    chosen = search.choice is not None and search.choice[0] is point
    return {
        "name": point.candidate.name,
        "step": point.step,
        "bits": [bit == "1" for bit in point.candidate.mask],
        "figures": [number(value) for value in point.values],
        "chosen": chosen,
    }


def _point(search: SelectionSearch, point: Point) -> list[str]:
    note = f"as {point.copied_from}" if point.copied_from else duration(point.seconds)
    return [
        point.candidate.name, described(point.candidate), point.candidate.mask, str(point.step),
        *(number(value) for value in point.values), note,
    ]  # fmt: skip


def _counts(search: SelectionSearch) -> dict[str, int]:
    trials = {point.candidate.name: point for point in search.points}
    return {
        "masks": len(trials),
        "copied": sum(bool(point.copied_from) for point in trials.values()),
        "points": len(search.points),
        "references": len({point.candidate.name for point in search.references}),
        "failed": len(search.failures),
    }
