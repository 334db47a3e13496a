"""What the points say: means over seeds, at the end, stopped in time, and against full fine-tuning of equal quality."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.finetuning.rows import ROWS, row_named
from benchmarks.mitigation.points import Point
from benchmarks.mitigation.summary import UNEVEN, at_quality, estimate

Line = Mapping[str, Any]

FIGURES = ("fid", "memorized_fraction", "copied_images", "copies_half", "mq_0.15", "membership_auc")
TOLERANCE = 0.005
RANDOM = "random"


def kind_of(row: str) -> str:
    """The row that a row counts as: random masks are one."""
    return RANDOM if row.startswith(RANDOM) else row


def label_of(kind: str) -> str:
    """What tables call a row."""
    return "random masks of the same size" if kind == RANDOM else row_named(kind).label


def summarize(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Means and intervals over seeds, a line for each setting, row and ``at``.

    ``at`` is ``end``; ``stopped``, the checkpoint of the best FID to the selection set among those whose MQ (of an
    uneven setting the share of copies, d1/d2 < 1/3) exceeds that of held-out images by at most half a percentage point
    (if there is none, the first: ``never`` counts the seeds); of an uneven setting ``stopped_half``, the same by
    d1/d2 < 1/2; or ``equal``, full fine-tuning stopped where it first has the FID of the row's end, seed by seed: its
    figures carry the suffix ``_full``; ``better`` and ``worse`` count seeds in which it is never as good, or better
    from its first mark on; only where neither is, there are figures.
    """
    courses: dict[tuple[str, str, int], list[Point]] = defaultdict(list)
    for point in sorted(points, key=lambda point: point["length"]):
        courses[point["setting"], point["row"], point["seed"]].append(point)
    groups: dict[tuple[str, str], list[list[Point]]] = defaultdict(list)
    for (setting, row, _), course in courses.items():
        groups[setting, kind_of(row)].append(course)
    order = [*dict.fromkeys(kind_of(row.name) for row in ROWS)]
    lines = []
    for (setting, kind), group in sorted(groups.items(), key=lambda entry: (entry[0][0], order.index(entry[0][1]))):
        common = {"setting": setting, "row": kind, "label": label_of(kind)}
        lines.append({**common, "at": "end", **_means([course[-1] for course in group])})
        for at, copies in stopping_rules(group[0][0]).items():
            lines.append({**common, "at": at, **_means([stopped(course, copies) for course in group]),
                          "never": sum(not _allowed(course, copies) for course in group)})  # fmt: skip
        if kind != "full":
            rivals = [courses.get((setting, "full", course[0]["seed"]), []) for course in group]
            lines.append({**common, "at": "equal", **_against(group, rivals)})
    return lines


def stopping_rules(point: Point) -> dict[str, str]:
    """By which figure of copies a run is stopped, by the name of what comes of it.

    MQ moves long before the others do; of an uneven setting it is not known, and a copy is what it is to the benchmark
    of training from scratch.
    """
    if "copies_repeated" in point:
        return {"stopped": "memorized_fraction", "stopped_half": "copies_half"}
    return {"stopped": "mq_0.15"}


def stopped(course: Sequence[Point], copies: str) -> Point:
    """The checkpoint where a run is stopped before it copies: the best of those that are allowed, or the first."""
    return min(_allowed(course, copies) or course[:1], key=lambda point: point["fid_selection"])


def _allowed(course: Sequence[Point], copies: str) -> list[Point]:
    return [point for point in course if point[copies] <= point[f"{copies}_control"] + TOLERANCE]


def _means(group: Sequence[Point]) -> dict[str, Any]:
    line: dict[str, Any] = {"seeds": len({point["seed"] for point in group}), "runs": len(group)}
    for name in ("length", "steps", "share", "seconds", "skip_rate", "fid_train"):
        line[name] = float(np.mean([point[name] for point in group]))
    for name in (name for name in (*FIGURES, *UNEVEN) if name in group[0]):
        line |= estimate(name, [point[name] for point in group])
        if f"{name}_control" in group[0]:
            line[f"{name}_control"] = float(np.mean([point[f"{name}_control"] for point in group]))
    return line


def _against(group: Sequence[Sequence[Point]], rivals: Sequence[Sequence[Point]]) -> dict[str, Any]:
    """Each run's end beside full fine-tuning where it first has the same FID."""
    ends = [course[-1] for course in group]
    there = [at_quality(rival, end["fid"]) for end, rival in zip(ends, rivals, strict=True)]
    line: dict[str, Any] = {"runs": len(ends)}
    pairs = [(end, rival) for end, rival in zip(ends, rivals, strict=True) if rival]
    line["better"] = sum(min(mark["fid"] for mark in rival) > end["fid"] for end, rival in pairs)
    line["worse"] = sum(rival[0]["fid"] < end["fid"] for end, rival in pairs)
    if all(place is not None for place in there):
        for name in (name for name in ("fid", "memorized_fraction", "mq_0.15", "membership_auc") if name in ends[0]):
            own = [end[name] for end in ends]
            full = [place[name] for place in there if place is not None]
            line |= {name: float(np.mean(own)), f"{name}_full": float(np.mean(full))}
            line |= estimate(f"{name}_difference", [a - b for a, b in zip(own, full, strict=True)])
    return line
