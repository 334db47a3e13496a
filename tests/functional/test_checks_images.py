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


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([[0.0]], TypeError, "Argument `x` expected a tensor, but got list. Convert it"),
        (torch.zeros(3), ValueError, r"shape \(N, C, H, W\), but got \(3,\). Add"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "uint8 or floating point, but got torch.int64. Convert"),
        (torch.tensor([[0.0, 1.5]]), ValueError, r"in \[0, 1\], but got values from 0 to 1.5. Scale"),
        (torch.tensor([[-1.0, 1.0]]), ValueError, r"in \[0, 1\], but got values from -1 to 1. Scale"),
        (torch.tensor([[0.0, torch.nan]]), ValueError, r"in \[0, 1\], but got NaN. Scale"),
        (torch.tensor([[0.0, torch.inf]]), ValueError, r"in \[0, 1\], but got values from 0 to inf. Scale"),
    ],
)
def test_what_is_no_image_is_refused(images, error, message):
    with pytest.raises(error, match=message):
        image_rows(images, name="x")
