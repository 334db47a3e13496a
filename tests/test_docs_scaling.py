"""The communication plan in the documentation is what its benchmark prints."""

from pathlib import Path

import pytest

from benchmarks.communication import Plan, table

PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()


def test_the_plan_is_the_one_that_is_printed():
    assert table(1.0) in PAGE


@pytest.mark.parametrize("processes", [2, 8])
def test_bytes_are_those_of_a_sum_over_steps(processes):
    """Ten images in batches of two, three parameters, rounds of five epochs."""
    plan = Plan(processes, parameters=3, samples=10, batch_size=2, epochs_per_round=5)
    images, steps, ddp = 10, 0, 0.0
    while images > 0:
        images -= 2 * processes
        steps += 1
        ddp += 2 * (processes - 1) / processes * 3 * 4
    assert plan.steps == steps
    assert plan.ddp_bytes == pytest.approx(ddp)
    assert plan.averaging_bytes == pytest.approx(2 * (processes - 1) / processes * 2 * 3 * 4)
    assert plan.shard_bytes == pytest.approx(plan.averaging_bytes / 5)
