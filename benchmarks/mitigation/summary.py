"""What the points say: early stopping, means over seeds, and every method against plain training of equal quality."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.mitigation.points import Point, row_named
from benchmarks.mitigation.rows import ROWS
from benchmarks.mitigation.scoring import QUARTERS
from benchmarks.mitigation.statistics import bootstrap

Line = Mapping[str, Any]

FIGURES = ("fid", "memorized_fraction", "copied_images", "mq_0.15", "mq_0.3", "membership_auc")
UNEVEN = (
    "copies_repeated", "copies_repeated_half", "copies_once", "copies_once_half", "nearest_repeated",
    "membership_auc_repeated", "membership_auc_once",
)  # fmt: skip
"""Figures of uneven training sets only."""
BY_QUARTER = tuple(
    name.format(quarter)
    for name in ("copies_quarter_{}", "copies_quarter_{}_half", "nearest_quarter_{}", "membership_auc_quarter_{}")
    for quarter in QUARTERS
)
"""Figures by quarters of the training images, where a setting tells typical ones apart."""
TOLERANCE = 0.005  # share of drawn images: two of 400
_KEPT = ("memorized_fraction", "mq_0.15", "membership_auc")  # that are compared at equal quality
STOPPED = {"stopped_on_loss": ("plain, stopped at the least held-out loss", "unseen_loss"),
           "stopped_on_fid": ("plain, stopped at the best held-out FID", "fid_selection")}  # fmt: skip


def label_of(row: str) -> str:
    """What tables call a row."""
    return STOPPED[row][0] if row in STOPPED else row_named(row).label


def at_greatest_length(lines: Sequence[Line]) -> list[Line]:
    """Each row at its greatest length, in the order of the rows, early stopping behind plain training."""
    last = {line["row"]: line for line in sorted(lines, key=lambda line: line["length"] or 0)}
    order = ["plain", *STOPPED, *(row.name for row in ROWS[1:])]
    return sorted(last.values(), key=lambda line: order.index(line["row"]))


def with_early_stopping(points: Sequence[Point]) -> list[Point]:
    """Add plain training, stopped where its held-out loss, or the FID to a set of its own, was least.

    Both choose among the marks of the same run, seed by seed; what is reported compares the same drawn images with
    other real ones.
    """
    courses = defaultdict(list)
    for point in points:
        if point["row"] == "plain":
            courses[point["setting"], point["seed"]].append(point)
    stopped = [
        {**min(course, key=lambda point: point[watched]), "row": name}
        for name, (_, watched) in STOPPED.items()
        for course in courses.values()
    ]
    return [*points, *stopped]


def summarize(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Means and 95 % intervals over seeds, by setting, row and length; rows of early stopping have no length.

    Time is a share of that of plain training of as many steps in the same seed; of early stopping, of its longest.
    """
    everything = with_early_stopping(points)
    plain = {(p["setting"], p["row"], p["seed"], p["length"]): p["seconds"] for p in points}
    longest: dict[str, float] = {}
    for setting, row, _, length in plain:
        if row == "plain":
            longest[setting] = max(length, longest.get(setting, 0))
    groups = defaultdict(list)
    for point in everything:
        groups[point["setting"], point["row"], None if point["row"] in STOPPED else point["length"]].append(point)
    lines = []
    for (setting, row, length), group in groups.items():
        line = {"setting": setting, "row": row, "label": label_of(row), "length": length, "seeds": len(group)}
        line["steps"] = float(np.mean([point["steps"] for point in group]))
        for name in (name for name in (*FIGURES, *UNEVEN, *BY_QUARTER) if name in group[0]):
            line |= estimate(name, [point[name] for point in group])
            if f"{name}_control" in group[0]:
                line[f"{name}_control"] = float(np.mean([point[f"{name}_control"] for point in group]))
        line["skip_rate"] = float(np.mean([point["skip_rate"] for point in group]))
        line["fid_train"] = float(np.mean([point["fid_train"] for point in group]))
        rival = "plain" if row in STOPPED else row_named(row).rival
        keys = [(setting, rival, p["seed"], longest[setting] if length is None else length) for p in group]
        ratios = [p["seconds"] / plain[key] for p, key in zip(group, keys, strict=True) if plain.get(key)]
        line["time"] = float(np.mean(ratios)) if len(ratios) == len(group) else None
        lines.append(line)
    return lines


def equal_quality(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Each method against plain training, stopped where it first had the method's FID.

    Seed by seed: plain training's course is drawn straight between its marks, and read where its FID first comes down
    to that of the method. Only where every seed has such a place are figures compared. Differences are the method's
    figure less plain training's: below 0, the method memorises less at equal quality. Time is the method's over that of
    plain training until there. ``better`` and ``worse`` count the seeds in which plain training never had an FID as
    low, or had a lower one at its first mark already.
    """
    points = [point for point in points if "mq_0.15" in point]
    courses = defaultdict(list)
    for point in sorted(points, key=lambda point: point["length"]):
        if row_named(point["row"]).is_plain:
            courses[point["setting"], point["row"], point["seed"]].append(point)
    groups = defaultdict(list)
    for point in points:
        row = row_named(point["row"])
        if not row.is_plain and (point["setting"], row.rival, point["seed"]) in courses:
            groups[point["setting"], point["row"], point["length"]].append(point)
    lines = []
    for (setting, row, length), group in groups.items():
        mine = [courses[setting, row_named(row).rival, point["seed"]] for point in group]
        line = {"setting": setting, "row": row, "label": label_of(row), "length": length, "seeds": len(group)}
        line["fid"] = float(np.mean([point["fid"] for point in group]))
        line["better"] = sum(
            min(p["fid"] for p in course) > point["fid"] for point, course in zip(group, mine, strict=True)
        )
        line["worse"] = sum(course[0]["fid"] < point["fid"] for point, course in zip(group, mine, strict=True))
        rivals = [at_quality(course, point["fid"]) for point, course in zip(group, mine, strict=True)]
        pairs = [(point, rival) for point, rival in zip(group, rivals, strict=True) if rival is not None]
        lines.append(line | (_compared(pairs) if len(pairs) == len(group) else {}))
    return lines


def stopped_in_time(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Each row of an uneven setting at its best checkpoint among those that copy no more than held-out images do.

    Seed by seed: of the marks at which the share of drawn images that copy a repeated image exceeds that of held-out
    images by at most half a percentage point, the one with the least FID to a set of its own (``fid_selection``);
    reported is the FID to the reference set. ``never`` counts the seeds in which every mark copied more: those count
    with their first mark.
    """
    courses = defaultdict(list)
    for point in points:
        if "copies_repeated" in point:
            courses[point["setting"], point["row"], point["seed"]].append(point)
    groups, never = defaultdict(list), defaultdict(int)
    for (setting, row, _), course in courses.items():
        allowed = [p for p in course if p["copies_repeated"] <= p["copies_repeated_control"] + TOLERANCE]
        never[setting, row] += not allowed
        chosen = allowed or [min(course, key=lambda p: p["length"])]
        groups[setting, row].append(min(chosen, key=lambda p: p["fid_selection"]))
    lines = []
    for (setting, row), group in groups.items():
        line = {
            "setting": setting,
            "row": row,
            "label": label_of(row),
            "seeds": len(group),
            "never": never[setting, row],
        }
        line["length"] = float(np.mean([point["length"] for point in group]))
        for name in ("fid", *UNEVEN):
            line |= estimate(name, [point[name] for point in group])
            if f"{name}_control" in group[0]:
                line[f"{name}_control"] = float(np.mean([point[f"{name}_control"] for point in group]))
        line["skip_rate"] = float(np.mean([point["skip_rate"] for point in group]))
        lines.append(line)
    return lines


def _compared(pairs: Sequence[tuple[Point, Mapping[str, float]]]) -> dict[str, float]:
    """Means of the method, of plain training, and of their difference."""
    line = {"time": float(np.mean([point["seconds"] / rival["seconds"] for point, rival in pairs]))}
    for name in _KEPT:
        line[name] = float(np.mean([point[name] for point, _ in pairs]))
        line[f"{name}_plain"] = float(np.mean([rival[name] for _, rival in pairs]))
        line |= estimate(f"{name}_difference", [point[name] - rival[name] for point, rival in pairs])
    return line


def at_quality(course: Sequence[Point], fid: float) -> dict[str, float] | None:
    """Figures of a course where its FID first comes down to a value, drawn straight between marks.

    None where it never does, or was lower at the first mark already.

    Example:
        >>> marks = [{"fid": 9.0, "seconds": 1.0}, {"fid": 5.0, "seconds": 3.0}]
        >>> at_quality(marks, 7.0)["seconds"], at_quality(marks, 9.0)["seconds"]
        (2.0, 1.0)
        >>> at_quality(marks, 4.0), at_quality(marks, 10.0)
        (None, None)
    """
    if not course or course[0]["fid"] < fid:
        return None
    before = course[0]
    for mark in course:
        if mark["fid"] <= fid:
            gained = before["fid"] - mark["fid"]
            share = (before["fid"] - fid) / gained if gained else 0.0
            names = [name for name in (*_KEPT, "fid", "seconds", "length") if name in mark]
            return {name: before[name] + share * (mark[name] - before[name]) for name in names}
        before = mark
    return None


def estimate(name: str, values: Sequence[float]) -> dict[str, float]:
    """A mean with its interval, under names for a line."""
    found = bootstrap(values)
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
