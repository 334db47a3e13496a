"""Early stopping, means and equal quality, against loops that a child could check."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.mitigation.statistics import bootstrap
from benchmarks.mitigation.summary import at_quality, equal_quality, summarize, with_early_stopping
from tests.helpers.benchmark import point


def find(lines, row, length):
    return next(line for line in lines if line["row"] == row and line["length"] == length)


def test_bootstrap_of_two_values_covers_what_resamples_can_give():
    estimate = bootstrap([0.0, 1.0])
    assert estimate.mean == 0.5
    assert (estimate.low, estimate.high) == (0, 1)  # a quarter of all resamples each: more than 2.5 %


def test_bootstrap_agrees_with_all_resamples_written_out():
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    means = sorted(sum(drawn) / 5 for drawn in itertools.product(values, repeat=5))
    estimate = bootstrap(values)
    assert estimate.low == pytest.approx(means[int(0.025 * len(means))], rel=0.05)
    assert estimate.high == pytest.approx(means[int(0.975 * len(means))], rel=0.05)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=6))
def test_bootstrap_stays_between_the_extremes(values):
    estimate = bootstrap(values)
    assert min(values) - 1e-9 <= estimate.low <= estimate.mean + 1e-9
    assert estimate.mean - 1e-9 <= estimate.high <= max(values) + 1e-9


def test_bootstrap_without_values_is_refused():
    with pytest.raises(ValueError, match="Argument `values` expected one for each seed"):
        bootstrap([])


def test_stopping_is_chosen_by_one_set_and_reported_on_another():
    points = [
        point("plain", 0, 1, fid=9.0, memorized=0.0, unseen=0.3, selection=8.0),
        point("plain", 0, 2, fid=5.0, memorized=0.2, unseen=0.2, selection=6.0),
        point("plain", 0, 4, fid=4.0, memorized=0.5, unseen=0.4, selection=5.0),
        point("plain", 1, 1, fid=9.0, memorized=0.0, unseen=0.1, selection=3.0),
        point("plain", 1, 2, fid=5.0, memorized=0.3, unseen=0.2, selection=6.0),
    ]
    lines = summarize(points)
    assert find(lines, "stopped_on_loss", None)["fid"] == (5.0 + 9.0) / 2
    assert find(lines, "stopped_on_fid", None)["memorized_fraction"] == (0.5 + 0.0) / 2
    assert len(with_early_stopping(points)) == len(points) + 4


def test_means_over_seeds_and_time_as_a_share_of_plain_training():
    points = [
        point("plain", 0, 4, 4.0, 0.5, seconds=10), point("plain", 1, 4, 6.0, 0.7, seconds=20),
        point("iet_4", 0, 4, 5.0, 0.1, seconds=11), point("iet_4", 1, 4, 7.0, 0.3, seconds=26),
    ]  # fmt: skip
    line = find(summarize(points), "iet_4", 4)
    assert line["fid"] == 6.0
    assert line["time"] == pytest.approx((1.1 + 1.3) / 2)
    assert (line["memorized_fraction_low"], line["memorized_fraction_high"]) == (0.1, 0.3)
    assert line["memorized_fraction_control"] == pytest.approx(0.1)


def test_equal_quality_reads_the_course_of_plain_training_between_its_marks():
    points = [
        point("plain", 0, 1, fid=10.0, memorized=0.0), point("plain", 0, 2, fid=6.0, memorized=0.4),
        point("iet_4", 0, 2, fid=7.0, memorized=0.1, seconds=3.5),
    ]  # fmt: skip
    (line,) = equal_quality(points)
    assert line["memorized_fraction_plain"] == pytest.approx(0.3)  # three quarters of the way from 10 to 6
    assert line["memorized_fraction_difference"] == pytest.approx(-0.2)
    assert line["time"] == pytest.approx(3.5 / 1.75)


@pytest.mark.parametrize(("fid", "better", "worse"), [(9.0, 1, 0), (12.0, 0, 1)])
def test_a_quality_that_plain_training_never_had_is_said_and_not_compared(fid, better, worse):
    (line,) = equal_quality([point("plain", 0, 1, 10.0, 0.0), point("iet_4", 0, 1, fid, 0.0)])
    assert (line["better"], line["worse"]) == (better, worse)
    assert "time" not in line


def test_one_seed_without_a_rival_and_nothing_is_compared():
    points = [point("plain", 0, 1, 10.0, 0.0), point("plain", 1, 1, 10.0, 0.0)]
    points += [point("iet_4", 0, 1, 10.0, 0.0), point("iet_4", 1, 1, 9.0, 0.0)]
    (line,) = equal_quality(points)
    assert (line["better"], line["seeds"]) == (1, 2)
    assert "memorized_fraction_difference" not in line


def test_rows_on_fewer_images_are_compared_with_plain_training_on_as_many():
    points = [point("plain", 0, 1, 5.0, 0.9), point("plain_x0.5", 0, 1, 5.0, 0.6)]
    points.append(point("iet_agc_4_x0.5", 0, 1, 5.0, 0.2))
    assert find(equal_quality(points), "iet_agc_4_x0.5", 1)["memorized_fraction_difference"] == pytest.approx(-0.4)


@given(st.lists(st.floats(1, 100), min_size=1, max_size=6), st.floats(0.5, 110))
def test_the_course_is_read_where_it_first_comes_down(fids, fid):
    course = [{"fid": value, "seconds": float(place)} for place, value in enumerate(fids)]
    found = at_quality(course, fid)
    first = next((place for place, value in enumerate(fids) if value <= fid), None)
    if first is None or fids[0] < fid:
        assert found is None
    else:
        assert max(0, first - 1) <= found["seconds"] <= first
        assert found["fid"] == pytest.approx(fid)
