"""The report of a search: what it says in sentences and rows, the page report.html, and all files in its folder."""

import io
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log10
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from scipy.stats import t as student

import lightning_iet
from lightning_iet.functional.bit_effects import BitEffects, bit_effects
from lightning_iet.plots import CONTROL, GENERATED, INK, QUIET, effect_bars, lay_out, save_figure, selection_front
from lightning_iet.search.selection_points import Point, SelectionSearch, described, write_points
from lightning_iet.utilities.files import write_atomically, write_json
from lightning_iet.utilities.pages import page_template, stylesheet
from lightning_iet.utilities.text import in_words

_PACKAGE = "lightning_iet.search"

# Colours of the figures, as the page calls them; what is not named here is the same by day and by night.
_COLOURS = {
    GENERATED: "var(--generated)", CONTROL: "var(--control)", INK: "var(--ink)", QUIET: "var(--quiet)",
    "#e6e6e6": "var(--line)", "#ffffff": "none", "#5b7f3a": "var(--family)",
}  # fmt: skip


def render_page(search: SelectionSearch, figures: Sequence[Figure] | None = None) -> str:
    """Write the report of a search as HTML.

    Every name is escaped; the page holds no script, and a content security policy lets it load nothing.

    Args:
        search: What was found.
        figures: The front as :func:`front_figures` draws it, if it is drawn already.
    """
    template = page_template(_PACKAGE)
    fronts = [
        {"label": label, "svg": _svg(figure)}
        for label, figure in zip(search.labels[1:], figures or front_figures(search), strict=True)
    ]
    found = effects(search)
    known = bool(found) and any(part.effect.isfinite().any() for part in found.values())
    return template.render(
        css=Markup(stylesheet(_PACKAGE)),  # noqa: S704 (our own file)
        verdict=verdict(search),
        quality=search.labels[0],
        fronts=fronts,
        front=front_rows(search),
        groups=search.groups,
        masks=[_mask(search, point) for point in search.front if point.candidate.kind == "mask"],
        effects=_svg(_effect_figure(search, found)) if known else "",
        effect_rows=effect_rows(search) if found else [],
        joint=all(part.joint for part in found.values()),
        freedom=min((part.degrees_of_freedom for part in found.values()), default=0),
        labels=search.labels,
        points=[_point(search, point) for point in search.all_points],
        failures=list(search.failures.items()),
        running=search.running,
        controls=[
            (label, number(control))
            for label, control in zip(search.labels, search.controls, strict=True)
            if control is not None
        ],
        settings=[(name, str(value)) for name, value in search.settings.items()],
        counts=_counts(search),
        version=lightning_iet.__version__,
    )


def front_figures(search: SelectionSearch) -> list[Figure]:
    """Draw the front, one figure for each objective of memorization against the first objective."""
    names, points = search.labels, search.points
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


def _effect_figure(search: SelectionSearch, found: Mapping[str, BitEffects]) -> Figure:
    """Draw the effect of each bit on each objective, with 95 % intervals."""
    parts = {label: (part.effect.tolist(), interval(part)) for label, part in found.items()}
    return effect_bars(search.groups, parts, note="Effect of training a group")


def _svg(figure: Figure) -> Markup:
    """A figure as a part of the page, in the page's colours and letters."""
    buffer = io.StringIO()
    lay_out(figure)
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
        "figures": _cells(point),
        "chosen": chosen,
    }


def _point(search: SelectionSearch, point: Point) -> list[str]:
    note = f"as {point.copied_from}" if point.copied_from else in_words(point.seconds)
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


CONFIDENCE = 0.95
_REMEDY = (
    "Take a figure that is no count, such as membership_inference_auc, or trials that are long enough to memorize."
)


@dataclass(frozen=True)
class Verdict:
    """The outcome of a search.

    Attributes:
        headline: in one sentence.
        details: what it rests on, and what the choice must be compared with, a sentence each.
    """

    headline: str
    details: tuple[str, ...]


def verdict(search: SelectionSearch) -> Verdict:
    """Say what was chosen, by which rule, and whether stopping in time would have done as well."""
    if search.choice is None:
        return Verdict("No mask was trained to the end", (f"{len(search.failures)} trials failed.",))
    point, choice = search.choice
    still = unmoved(search)
    if choice.rule == "control" and still >= set(search.labels[1:]):
        headline = f"Chosen: {described(point.candidate)}, by {search.labels[0]} alone: no trial memorized"
        rule = "No trial, plain fine-tuning included, memorized more than held-out images do, by these figures."
    elif choice.rule == "control":
        headline = f"Chosen: {described(point.candidate)}, which memorizes no more than held-out images show"
        rule = f"Best quality among the masks that memorize at most as much as held-out images{_allowance(search)}."
    elif None in search.limits:
        headline = f"Chosen: {described(point.candidate)}, the knee of the front"
        rule = "The trials measured no control, so that the knee of the front was taken."
    else:
        headline = f"Chosen: {described(point.candidate)}, the knee of the front; every mask memorizes"
        rule = "No mask memorizes as little as held-out images do; the knee of the front was taken."
    names = ", ".join(f"{label} {cell}" for label, cell in zip(search.labels, _cells(point), strict=True))
    share = "" if point.share is None else f" ({100 * point.share:.3g} % of the network)"
    trained = "" if point.trained is None else f"; {point.trained:,} parameters train{share}"
    warnings = [
        f"{label} was {cell} at every checkpoint of every trial, so that the search could not tell masks apart by it. "
        f"{_REMEDY if label in search.labels[1:] else 'Train for longer.'}"
        for label, cell in zip(search.labels, _cells(point), strict=True)
        if label in still
    ]
    warnings += [
        f"Every mask has {label} {cell}, unlike plain fine-tuning: the search could not tell masks apart by it."
        for label, cell in zip(search.labels, _cells(point), strict=True)
        if label in unmoved(search, masks=True) - still
    ]
    result = f"{point.candidate.name} at step {point.step}: {names}{trained}."
    return Verdict(headline, (*warnings, result, rule, *compared(search)))


def _allowance(search: SelectionSearch) -> str:
    """What the rule of the control lets masks memorize beyond it: a standard error, where one is known."""
    names, errors = search.labels[1:], search.control_errors[1:]
    known = [name for name, error in zip(names, errors, strict=True) if error is not None]
    if not known:
        return ""
    which = "" if len(known) == len(names) else f" of {' and '.join(known)}"
    return f" and one standard error{which}"


def unmoved(search: SelectionSearch, *, masks: bool = False) -> frozenset[str]:
    """Return the objectives that had one value at all checkpoints of all trials, and so say nothing of masks.

    With ``masks``, of masks alone, not of plain fine-tuning and the pretrained network, from which they may all differ.
    """
    points = [p for p in search.all_points if not masks or p.candidate.kind == "mask"]
    if len({point.candidate.name for point in points}) < 2:
        return frozenset()
    columns = zip(*(point.values for point in points), strict=True)
    return frozenset(label for label, values in zip(search.labels, columns, strict=True) if len(set(values)) == 1)


def compared(search: SelectionSearch) -> list[str]:
    """Compare the chosen point with stopping plain fine-tuning, or the whole family, at its quality."""
    if search.choice is None:
        return []
    point = search.choice[0]
    own = search.costs([point])[0].tolist()
    quality, *memorization = search.labels
    rivals = {
        "plain fine-tuning": [p for course in search.course(kind="plain").values() for p in course],
        "the whole family": [
            p for course in search.course(kind="mask", mask="1" * len(search.groups)).values() for p in course
        ],
    }
    sentences = []
    for name, points in rivals.items():
        others = [p for p in points if p is not point]
        if not others:
            continue
        rival = search.at_quality(others, own[0])
        if rival is None:
            sentences.append(f"No checkpoint of {name} reaches this {quality}.")
            continue
        costs = search.costs([rival])[0].tolist()
        figures = ", ".join(f"{label} {cell}" for label, cell in zip(memorization, _cells(rival)[1:], strict=True))
        better = sum(a < b for a, b in zip(own[1:], costs[1:], strict=True))
        worse = sum(a > b for a, b in zip(own[1:], costs[1:], strict=True))
        judged = (
            "more than the mask" if better and not worse else "no more than the mask" if not better else "partly more"
        )
        sentences.append(
            f"Stopped at this {quality} or better, {name} memorizes {judged}: {figures} "
            f"({rival.candidate.name} at step {rival.step})."
        )
    return sentences


def front_rows(search: SelectionSearch) -> list[list[str]]:
    """Return a header and a row for each point of the front, then the last points of the references."""
    header = ["", "trial", "trains", "learning rate", "step", "share", *search.labels]
    chosen = search.choice[0] if search.choice else None
    rows = [_row(search, point, "chosen" if point is chosen else "front") for point in search.front]
    if chosen is not None and chosen not in search.front:
        rows.append(_row(search, chosen, "chosen"))
    references = [point for point in search.references if point.last]
    family = search.course(kind="mask", mask="1" * len(search.groups))
    ends = [course[-1] for course in family.values() if course[-1] not in search.front]
    return [header, *rows, *(_row(search, point, "reference") for point in [*ends, *references])]


def front_table(search: SelectionSearch) -> Table:
    """Lay out the front for rich's console, in 80 columns: what trains and long names go over several lines."""
    said = verdict(search)
    table = Table(
        title=said.headline, caption="\n".join(said.details), title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    header, *rows = front_rows(search)
    shown = [column for column in range(len(header)) if header[column] != "share" or any(row[column] for row in rows)]
    for column in shown:
        free = header[column] in ("trains", *search.labels)  # to be broken anywhere
        table.add_column(
            "rate" if header[column] == "learning rate" else header[column],
            justify="left" if column < 3 else "right",
            no_wrap=not free,
            overflow="fold" if free else "ellipsis",
        )
    for number, row in enumerate(rows):
        following = rows[number + 1][0] if number + 1 < len(rows) else ""
        marked = ["chosen" if row[0] == "chosen" else "", *row[1:]]
        table.add_row(
            *(marked[column] for column in shown),
            style="bold" if row[0] == "chosen" else None,
            end_section=following == "reference" != row[0],
        )
    return table


def effects(search: SelectionSearch) -> dict[str, BitEffects]:
    """Estimate the effect of each bit on each objective, from the last point of every mask that was trained.

    The logarithm of the learning rate and its square are fitted along *(our choice: quality has its best somewhere
    between)*.
    """
    trained = [p for p in search.points if p.last and p.candidate.kind == "mask" and not p.copied_from]
    if not trained:
        return {}
    bits = torch.tensor([[int(bit) for bit in point.candidate.mask] for point in trained])
    rates = torch.tensor([log10(point.candidate.learning_rate) for point in trained], dtype=torch.float64)
    covariates = torch.stack([rates, rates**2], 1)
    columns = torch.tensor([point.values for point in trained], dtype=torch.float64).T
    return {
        label: bit_effects(bits, column, covariates=covariates)
        for label, column in zip(search.labels, columns, strict=True)
    }


def interval(found: BitEffects) -> list[float]:
    """Half the width of each effect's 95 % interval by Student's t, NaN without degrees of freedom."""
    if not found.degrees_of_freedom:
        return [float("nan")] * len(found.effect)
    return (float(student.ppf((1 + CONFIDENCE) / 2, found.degrees_of_freedom)) * found.standard_error).tolist()


def effect_rows(search: SelectionSearch) -> list[list[str]]:
    """Return a header and, for each group, its size and its effects with their standard errors."""
    found = effects(search)
    sizes = [f"{size:,}" for size in search.sizes] or [""] * len(search.groups)
    rows = [
        [group, size, *(_effect(part, number) for part in found.values())]
        for number, (group, size) in enumerate(zip(search.groups, sizes, strict=True))
    ]
    return [["group", "parameters", *(f"effect on {label}" for label in found)], *rows]


def _row(search: SelectionSearch, point: Point, role: str) -> list[str]:
    candidate = point.candidate
    share = "" if point.share is None else f"{100 * point.share:.3g} %"
    what = {"plain": "all parameters", "pretrained": "nothing"}.get(candidate.kind, candidate.mask)
    rate = f"{candidate.learning_rate:.2e}" if candidate.learning_rate else ""
    return [role, candidate.name, what, rate, str(point.step), share, *_cells(point)]


def _cells(point: Point) -> list[str]:
    return [number(value) for value in point.values]


def number(value: float) -> str:
    """Write a figure in four digits.

    Example:
        >>> number(0.0123456), number(0.0)
        ('0.01235', '0')
    """
    return f"{value:.4g}"


def _effect(found: BitEffects, group: int) -> str:
    effect, error = float(found.effect[group]), float(found.standard_error[group])
    if not isfinite(effect):
        return "not known"
    return f"{effect:+.3g} ± {error:.2g}" if isfinite(error) else f"{effect:+.3g}"


WriteMask: TypeAlias = Callable[..., object]

POINTS, FRONT, CHOSEN, REPORT, MASKS = "points.csv", "front.png", "chosen.json", "report.html", "masks"


def write_search(search: SelectionSearch, folder: Path, *, write_mask: WriteMask | None = None) -> None:
    """Write ``points.csv``, ``front.png``, ``masks/*.json``, ``chosen.json`` and ``report.html`` into a folder.

    ``write_mask`` writes a mask to a path, with where it comes from; by default as JSON with the groups' names.
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
        write(unfinished / f"{number:02d}.json", mask=point.candidate.mask, source=source(search, point))
    shutil.rmtree(folder / MASKS, ignore_errors=True)
    unfinished.rename(folder / MASKS)
    if search.choice is not None:
        point, choice = search.choice
        write(folder / CHOSEN, mask=point.candidate.mask, source={**source(search, point), "rule": choice.rule})
    with write_atomically(folder / REPORT) as path:
        path.write_text(render_page(search, figures), encoding="utf-8")


def source(search: SelectionSearch, point: Point) -> dict[str, Any]:
    """Where a mask comes from: its trial, and what it was judged by."""
    return {
        "trial": point.candidate.name,
        "learning_rate": point.candidate.learning_rate,
        "step": point.step,
        "objectives": dict(zip(search.labels, point.values, strict=True)),
        "controls": dict(zip(search.labels, search.controls, strict=True)),
        "share": point.share,
        "settings": dict(search.settings),
    }


def _plain_writer(search: SelectionSearch) -> WriteMask:
    """Writes a mask of groups whose network is not known."""

    def write(path: Path, *, mask: str, source: Mapping[str, Any]) -> None:
        bits = {name: int(bit) for name, bit in zip(search.groups, mask, strict=True)}
        write_json(path, {"groups": list(search.groups), "mask": bits, "source": source})

    return write
