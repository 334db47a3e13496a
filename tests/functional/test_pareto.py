"""Fronts, volumes and choices, against loops over all points."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional.pareto import choose_point, hypervolume, knee_distance, pareto_front

WHOLE = st.integers(0, 5).map(float)  # few values, so that there are ties


def tables(most=12, objectives=(1, 2, 3)):
    return st.sampled_from(objectives).flatmap(
        lambda p: st.lists(st.lists(WHOLE, min_size=p, max_size=p), min_size=1, max_size=most)
    )


def dominates(u, v):
    return all(a <= b for a, b in zip(u, v, strict=True)) and any(a < b for a, b in zip(u, v, strict=True))


@given(tables())
def test_the_front_is_what_nothing_dominates(rows):
    expected = [not any(dominates(other, row) for other in rows) for row in rows]
    assert pareto_front(torch.tensor(rows)).tolist() == expected


def test_a_front_of_more_points_than_are_compared_at_once():
    values = torch.rand(2500, 2, generator=torch.Generator().manual_seed(0))
    best, expected = float("inf"), torch.zeros(2500, dtype=torch.bool)
    for index in values[:, 0].argsort().tolist():
        if values[index, 1] < best:
            best, expected[index] = values[index, 1], True
    assert torch.equal(pareto_front(values), expected)


@given(tables(most=6))
def test_hypervolume_counts_the_unit_cells_below_the_reference(rows):
    corner = [4] * len(rows[0])
    cells = sum(
        any(all(a <= c for a, c in zip(row, cell, strict=True)) for row in rows)
        for cell in product(*(range(c) for c in corner))
    )
    assert hypervolume(torch.tensor(rows), corner) == cells


@given(tables(objectives=(2,)))
def test_the_knee_is_the_distance_to_the_chord(rows):
    values = torch.tensor(rows, dtype=torch.float64)
    front = values[pareto_front(values)]
    low, span = front.min(0).values, front.max(0).values - front.min(0).values
    for point, distance in zip(front, knee_distance(front).tolist(), strict=True):
        x, y = (float((point[j] - low[j]) / span[j]) if span[j] > 0 else 0.0 for j in (0, 1))
        # The chord runs from (0, 1) to (1, 0); the sign is that of the side on which the origin lies.
        end, start = (1.0, 0.0), (0.0, 1.0)
        cross = (end[0] - start[0]) * (start[1] - y) - (start[0] - x) * (end[1] - start[1])
        assert distance == pytest.approx(cross / 2**0.5)


@given(tables(objectives=(2, 3)), st.lists(WHOLE, min_size=2, max_size=2), st.data())
def test_a_choice_is_what_a_loop_finds(rows, limits, data):
    trained = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    limits = limits[: len(rows[0]) - 1]
    front = [i for i, row in enumerate(rows) if not any(dominates(other, row) for other in rows)]
    kept = [i for i in front if all(a <= b for a, b in zip(rows[i][1:], limits, strict=True))]
    if kept:
        expected = (min(kept, key=lambda i: (rows[i][0], trained[i], i)), "control")
    else:
        lows = [min(rows[i][j] for i in front) for j in range(len(rows[0]))]
        highs = [max(rows[i][j] for i in front) for j in range(len(rows[0]))]
        scaled = {}
        for i in front:
            spans = zip(rows[i], lows, highs, strict=True)
            scaled[i] = [(value - low) / (high - low) if high > low else 0.0 for value, low, high in spans]
        best = max((1 - sum(scaled[i])) / len(lows) ** 0.5 for i in front)
        near = [i for i in front if abs((1 - sum(scaled[i])) / len(lows) ** 0.5 - best) < 1e-12]
        expected = (min(near, key=lambda i: (trained[i], i)), "knee")
    found = choose_point(torch.tensor(rows, dtype=torch.float64), limits=limits, trained=trained)
    assert found.rule == expected[1]
    if found.rule == "control":
        assert found.point == expected[0]
    else:  # rounding decides between points whose distances are equal on paper
        assert found.point in near


def test_what_is_no_table_is_refused_in_one_line():
    good = torch.rand(3, 2)
    for call, message in (
        (lambda: pareto_front(torch.rand(3)), r"shape \(N, p\), but got \(3,\)"),
        (lambda: pareto_front(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])), "NaN for point 1"),
        (lambda: choose_point(torch.rand(0, 2)), "at least one point"),
        (lambda: choose_point(good, limits=[1.0, 2.0]), "`limits` expected 1 numbers"),
        (lambda: choose_point(good, trained=[1]), "`trained` expected 3 numbers"),
        (lambda: hypervolume(good, [1.0]), "`reference` expected 2 numbers"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
