import os

import pytest
from PIL import UnidentifiedImageError

from lightning_iet.data.samples import Skip, listed, name_of, reason_of


def test_the_first_few_are_listed():
    skips = [Skip(f"{number}.png", "empty") for number in range(7)]
    assert listed(skips[:1]) == "'0.png' (empty)"
    assert listed(skips).endswith("'4.png' (empty), and 2 more")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("cut\n  off \x1b"), r"cut off \x1b"),
        (FileNotFoundError(2, os.strerror(2), "a.png"), "No such file or directory"),
        (
            UnidentifiedImageError("cannot identify image file <_io.BytesIO object at 0x7f>"),
            "not an image that Pillow knows",
        ),
        (MemoryError(), "MemoryError"),
    ],
)
def test_reasons_are_one_line(error, reason):
    assert reason_of(error) == reason


def test_samples_are_called_by_name_or_position():
    class Named(list):
        def name(self, index):
            return f"{index}\u202e.png"

    assert [name_of([1], 0), name_of(Named(), 7)] == ["0", r"7\u202e.png"]
