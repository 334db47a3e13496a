import pytest
import torch

from lightning_iet.audit.search import views
from tests.helpers.image_folders import random_pixels


def test_the_first_view_is_the_image_itself():
    images = random_pixels(3, channels=3)
    for invariance in ("none", "flip", "shift", "flip+shift"):
        assert torch.equal(next(iter(views(invariance).values()))(images), images)


def test_mirrored():
    images = random_pixels(3)
    assert torch.equal(views("flip")["mirrored"](images)[..., 0], images[..., -1])


@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (-1, 0), (0, 1), (1, -1)])
def test_shifts_move_pixels_and_repeat_the_border(dx, dy):
    images = random_pixels(2, channels=3)
    shifted = views("shift")[f"shifted by ({dx}, {dy})"](images)
    assert shifted.dtype == torch.uint8
    for y in range(8):
        for x in range(8):
            from_y, from_x = min(max(y - dy, 0), 7), min(max(x - dx, 0), 7)
            assert torch.equal(shifted[..., y, x], images[..., from_y, from_x])


def test_both_together():
    images = random_pixels(2)
    together = views("flip+shift")
    assert len(together) == 18
    shift = views("shift")["shifted by (1, 0)"]
    assert torch.equal(together["mirrored, shifted by (1, 0)"](images), shift(images.flip(-1)))
