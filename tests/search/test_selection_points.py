"""Objectives: their names, directions and controls."""

import math

import pytest

from lightning_iet.search.selection_points import Objective, parse_objectives


def test_names_as_loggers_write_them():
    quality, fraction, distance = parse_objectives(
        ["eval/fid", "min:memorized_fraction", "max:eval/average_minimum_distance"], minus_control=False
    )
    assert parse_objectives(["fid", "membership_inference_tpr@0.01"])[1].name == "membership_inference_tpr@0.01"
    assert (quality.name, fraction.name, distance.name) == ("fid", "memorized_fraction", "average_minimum_distance")
    assert [o.direction for o in (quality, fraction, distance)] == ["minimize", "minimize", "maximize"]
    assert not any(o.minus_control for o in (quality, fraction, distance))
    assert distance.cost(0.5) == -0.5


@pytest.mark.parametrize(
    ("maximize", "figure", "control", "expected"),
    [(False, 0.75, 0.25, 0.5), (False, 0.25, 0.75, 0.0), (True, 0.25, 0.75, 0.5), (True, 0.75, 0.25, 0.0)],
)
def test_only_what_lies_beyond_the_control_counts(maximize, figure, control, expected):
    objective = Objective("a", maximize=maximize, minus_control=True)
    figures = {"a": figure, "a_control": control}
    assert objective.value(figures) == expected
    assert objective.direction == "minimize"
    assert objective.cost(expected) == expected
    assert objective.control(figures) == 0.0


def test_quality_counts_as_it_is_and_its_control_is_a_line():
    quality, fraction = parse_objectives(["fid", "fraction"])
    figures = {"fid": 3.0, "fid_control": 1.0, "fraction": 0.5, "fraction_control": 0.5}
    assert quality.value(figures) == 3.0
    assert quality.control(figures) == 1.0
    assert fraction.value(figures) == 0.0
    assert Objective("x").control({"x": 1.0}) is None
    assert quality.control_error(figures) is None
    assert fraction.control_error({"fraction_control_standard_error": float("nan")}) is None
    assert fraction.control_error({"fraction_control_standard_error": 0.02}) == 0.02


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_what_is_no_number_fails_the_trial(bad):
    with pytest.raises(ArithmeticError, match="fid is"):
        Objective("fid").value({"fid": bad})
    with pytest.raises(ArithmeticError, match="a_control is"):
        Objective("a", minus_control=True).value({"a": 1.0, "a_control": bad})


@pytest.mark.parametrize(
    ("figures", "missing", "remedy"),
    [({"mifid": 1.0}, "`a` is not among mifid", "measure it"), ({"a": 1.0}, "`a_control`", "minus_control=False")],
)
def test_a_figure_that_is_not_there_is_named(figures, missing, remedy):
    with pytest.raises(KeyError) as error:
        Objective("a", minus_control=True).value(figures)
    assert missing in error.value.args[0]
    assert remedy in error.value.args[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["fid"], "at least two figures"),
        ("fid", "at least two figures"),
        (["fid", "max:eval/fid"], "`fid` twice"),
        (["fid", "most:amd"], r"\[max:\|min:\]NAME"),
        (["fid", ""], "NAME of a figure, but got ''"),
        (["fid", "a b"], "NAME of a figure, but got 'a b'"),
    ],
)
def test_bad_names(names, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_objectives(names)
    assert "\n" not in str(error.value)
