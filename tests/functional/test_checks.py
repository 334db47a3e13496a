"""What every function of features refuses; NaN would otherwise give numbers that look right."""

import math

import numpy as np
import pytest
import torch

from lightning_iet.functional.average_minimum_distance import average_minimum_distance
from lightning_iet.functional.checks import (
    check_at_least,
    check_kinds,
    check_number,
    check_numbers,
    image_rows,
    unit_interval,
)
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


def test_rows_keep_uint8_and_turn_other_floats_into_float32():
    images = torch.tensor([[[0, 51], [255, 102]]], dtype=torch.uint8)
    assert image_rows(images).dtype == torch.uint8
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        rows = image_rows(torch.zeros(3, 1, 2, 2, dtype=dtype))
        assert rows.dtype == torch.float32
        assert rows.shape == (3, 4)


def test_unit_interval_is_division_by_255():
    images = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(unit_interval(images), torch.arange(256) / 255)
    assert torch.equal(images, torch.arange(256, dtype=torch.uint8)), "the input must stay as it is"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_errors_outside_the_range_are_let_through(dtype):
    images = torch.tensor([[-1e-6, 0.5, 1 + 1e-6, 0.9995, 1.0005]], dtype=dtype)
    assert torch.equal(image_rows(images), images.float())
    for outside in (-0.002, 1.002):
        with pytest.raises(ValueError, match="expected values in"):
            image_rows(torch.tensor([[0.5, outside]], dtype=dtype))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([[0.0]], TypeError, "Argument `x` expected a tensor, but got list. Convert it"),
        (torch.zeros(3), ValueError, r"shape \(N, C, H, W\), but got \(3,\). Add"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "uint8 or floating point, but got torch.int64. Convert"),
        (torch.tensor([[0.0, 1.5]]), ValueError, r"in \[0, 1\], but got values from 0 to 1.5. Scale them by the range"),
        (torch.tensor([[0.0, 255.0]]), ValueError, r"values from 0 to 255. Scale them by images / 255, or pass .to\("),
        (
            torch.tensor([[-1.0, 1.0]]),
            ValueError,
            r"in \[0, 1\], but got values from -1 to 1. Scale them by \(images \+ 1\) / 2",
        ),
        (torch.tensor([[0.0, torch.nan]]), ValueError, r"in \[0, 1\], but got NaN. Scale"),
        (torch.tensor([[0.0, torch.inf]]), ValueError, r"in \[0, 1\], but got values from 0 to inf. Scale"),
    ],
)
def test_what_is_no_image_is_refused(images, error, message):
    with pytest.raises(error, match=message):
        image_rows(images, name="x")


def test_numbers_of_any_library_are_numbers():
    numbers = {"i": 2, "n": np.int64(2), "t": torch.tensor(2), "none": None}
    check_kinds(int, **numbers)
    check_kinds(float, **numbers, f=0.5, of_numpy=np.float32(0.5))
    for kind, value in ((float, "0.5"), (float, [0.5]), (int, 2.0), (int, "2")):
        with pytest.raises(TypeError, match=r"^Argument `a` expected an? (number|integer), but got .*\.$"):
            check_kinds(kind, a=value)
    with pytest.raises(TypeError, match=r"Argument `ratio` expected a number, but got '0\.3'"):
        check_number("ratio", "0.3", "(0, 1]", "The published one is 1/3.")


def test_none_passes_where_it_stands_for_a_default():
    check_at_least(1, optional=True, num_samples=None)
    with pytest.raises(TypeError, match="Argument `batch_size` expected an integer ≥ 1, but got None"):
        check_at_least(1, jobs=2, batch_size=None)
    with pytest.raises(ValueError, match="Argument `num_samples` expected an integer ≥ 1, but got 0"):
        check_at_least(1, optional=True, num_samples=0)
