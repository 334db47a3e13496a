import pytest
import torch

from lightning_iet.functional.checks import image_rows, unit_interval


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
