"""What every function of features refuses; NaN would otherwise give numbers that look right."""

import math

import pytest
import torch

from lightning_iet.functional.average_minimum_distance import average_minimum_distance
from lightning_iet.functional.checks import check_number, check_numbers
from lightning_iet.functional.density_coverage import density_coverage
from lightning_iet.functional.mifid import mifid
from lightning_iet.functional.precision_recall import precision_recall
from lightning_iet.functional.sscd_similarity import sscd_similarity

GOOD = torch.rand(9, 4, generator=torch.Generator().manual_seed(0))
BROKEN = GOOD.index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(math.nan))

every = pytest.mark.parametrize(
    "measure", [average_minimum_distance, density_coverage, mifid, precision_recall, sscd_similarity]
)


@every
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (
            BROKEN,
            ValueError,
            "expected finite features, .* for 1 of 9 images, the first of index 3",
        ),
        (GOOD / 0, ValueError, "expected finite features, but got NaN or infinity for 9 of 9 images"),
        (GOOD[:, :3], ValueError, "expected features of the width of `generated`, "),
        (GOOD[0], ValueError, r"expected features of shape \(N, D\), but got \(4,\)"),
        (GOOD.long(), TypeError, "expected a tensor of floating point, but got torch.int64"),
        ([1.0], TypeError, "expected a tensor of floating point, but got list"),
    ],
)
def test_bad_features_are_refused_in_one_line(measure, swap, bad, error, message):
    with pytest.raises(error, match=message) as caught:
        measure(*((GOOD, bad) if swap else (bad, GOOD)))
    assert "\n" not in str(caught.value)


def test_no_generated_images_have_no_density():
    with pytest.raises(ValueError, match="Argument `generated` expected at least one image, but got none"):
        density_coverage(GOOD[:0], GOOD)


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1]", (0, 0.5, 1), (-0.1, 1.1, math.nan, math.inf)),
        ("(0, 1]", (0.5, 1), (0, 1.1, math.nan)),
        ("(0, 1)", (0.5,), (0, 1, math.nan)),
        ("[-1, 1]", (-1, 0, 1), (-1.01, math.nan)),
    ],
)
def test_intervals_mean_what_is_written(interval, inside, outside):
    check_numbers("x", inside, interval, "Try another.")
    for value in inside:
        check_number("x", value, interval, "Try another.")
    for value in outside:
        with pytest.raises(ValueError, match=r"Argument `x` expected a number in .*Try another\."):
            check_number("x", value, interval, "Try another.")
        with pytest.raises(ValueError, match=r"Argument `x` expected numbers in .*Try another\."):
            check_numbers("x", (*inside, value), interval, "Try another.")
