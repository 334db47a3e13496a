"""What a search says, in sentences and rows, for the terminal and for the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, log10

import torch
from rich import box
from rich.table import Table
from scipy.stats import t as student

from lightning_iet.functional.bit_effects import BitEffects, bit_effects
from lightning_iet.search.selection_points import Point, SelectionSearch, described, labels

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
    if choice.rule == "control" and still >= set(labels(search)[1:]):
        headline = f"Chosen: {described(point.candidate)}, by {labels(search)[0]} alone: no trial memorized"
        rule = "No trial, plain fine-tuning included, memorized more than held-out images do, by these figures."
    elif choice.rule == "control":
        headline = f"Chosen: {described(point.candidate)}, which memorizes no more than held-out images show"
        rule = "Best quality among the masks that memorize at most as much as held-out images and one standard error."
    elif None in search.limits:
        headline = f"Chosen: {described(point.candidate)}, the knee of the front"
        rule = "The trials measured no control, so that the knee of the front was taken."
    else:
        headline = f"Chosen: {described(point.candidate)}, the knee of the front; every mask memorizes"
        rule = "No mask memorizes as little as held-out images do; the knee of the front was taken."
    names = ", ".join(f"{label} {cell}" for label, cell in zip(labels(search), _cells(search, point), strict=True))
    trained = "" if point.trained is None else f"; {point.trained:,} parameters train{_share(point)}"
    warnings = [
        f"{label} was {cell} at every checkpoint of every trial, so that the search could not tell masks apart by it. "
        f"{_REMEDY if label in labels(search)[1:] else 'Train for longer.'}"
        for label, cell in zip(labels(search), _cells(search, point), strict=True)
        if label in still
    ]
    warnings += [
        f"Every mask has {label} {cell}, unlike plain fine-tuning: the search could not tell masks apart by it."
        for label, cell in zip(labels(search), _cells(search, point), strict=True)
        if label in unmoved(search, masks=True) - still
    ]
    result = f"{point.candidate.name} at step {point.step}: {names}{trained}."
    return Verdict(headline, (*warnings, result, rule, *compared(search)))


def unmoved(search: SelectionSearch, *, masks: bool = False) -> frozenset[str]:
    """Return the objectives that had one value at all checkpoints of all trials, and so say nothing of masks.

    Args:
        search: what was found.
        masks: look at masks that were trained alone, not at plain fine-tuning and the pretrained network, from which
            they may all differ.
    """
    points = [p for p in search.all_points if not masks or p.candidate.kind == "mask"]
    if len({point.candidate.name for point in points}) < 2:
        return frozenset()
    columns = zip(*(point.values for point in points), strict=True)
    return frozenset(label for label, values in zip(labels(search), columns, strict=True) if len(set(values)) == 1)


def compared(search: SelectionSearch) -> list[str]:
    """Compare the chosen point with stopping plain fine-tuning, or the whole family, at its quality."""
    if search.choice is None:
        return []
    point = search.choice[0]
    own = search.costs([point])[0].tolist()
    quality, *memorization = labels(search)
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
        figures = ", ".join(
            f"{label} {cell}" for label, cell in zip(memorization, _cells(search, rival)[1:], strict=True)
        )
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
    header = ["", "trial", "trains", "learning rate", "step", "share", *labels(search)]
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
        free = header[column] in ("trains", *labels(search))  # to be broken anywhere
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
        for label, column in zip(labels(search), columns, strict=True)
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
    return [role, candidate.name, what, rate, str(point.step), share, *_cells(search, point)]


def _cells(search: SelectionSearch, point: Point) -> list[str]:
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


def _share(point: Point) -> str:
    return "" if point.share is None else f" ({100 * point.share:.3g} % of the network)"


def failed_rows(search: SelectionSearch) -> Sequence[tuple[str, str]]:
    """Return the names of failed trials and why they failed."""
    return tuple(search.failures.items())
