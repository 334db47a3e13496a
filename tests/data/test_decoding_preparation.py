import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lightning_iet.data.decoding import Preparation, decode, to_channels
from tests.helpers.pictures import pixels, png, to_bytes

COLOURS, GREYS, ALPHA = pixels(1)[0], pixels(1, channels=1)[0], pixels(1, channels=4)[0]


@pytest.mark.parametrize("stored", [COLOURS, GREYS, ALPHA], ids=["RGB", "L", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_way_of_storing_an_image_gives_the_same(stored, channels):
    prepare = Preparation(channels)
    image = prepare(png(stored))
    assert image.shape == (channels, 8, 8)
    assert image.dtype == torch.float32
    assert torch.equal(prepare(Image.fromarray(stored)), image)
    assert torch.equal(prepare(stored), image)
    if channels < 4:
        tensor = torch.from_numpy(np.atleast_3d(stored)).permute(2, 0, 1)
        torch.testing.assert_close(prepare(tensor), image, rtol=0, atol=1 / 255)  # blended in float, not in 8 bits


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_what_has_the_channels_keeps_its_pixels(channels):
    stored = {1: GREYS, 3: COLOURS, 4: ALPHA}[channels]
    assert np.array_equal(to_bytes(Preparation(channels)(png(stored))), stored)


def test_channels_one_by_one():
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    assert to_channels(red, 1).item() == pytest.approx(0.299, abs=1e-3)
    assert to_channels(red, 4).flatten().tolist() == [1, 0, 0, 1]
    grey = torch.full((1, 1, 1), 0.25)
    assert to_channels(grey, 3).flatten().tolist() == [0.25] * 3
    assert to_channels(grey, 4).flatten().tolist() == [0.25] * 3 + [1]
    clear = torch.tensor([1.0, 0, 0, 0]).view(4, 1, 1)
    assert to_channels(clear, 3).flatten().tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="1, 3 or 4 channels, not 2"):
        to_channels(torch.zeros(2, 1, 1), 3)


@given(st.integers(1, 20), st.integers(1, 20), st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_any_size_becomes_any_other(height, width, size):
    for fit in ("crop", "stretch"):
        for image in (torch.rand(3, height, width), torch.zeros(1, height, width, dtype=torch.uint8)):
            prepared = Preparation(3, size, fit)(image)
            assert prepared.shape == (3, *size)
            assert prepared.min() >= 0
            assert prepared.max() <= 1


def test_resizing_is_the_audits_to_rounding():
    stored = pixels(1, size=(40, 24))[0]
    image = to_bytes(Preparation(3, (16, 16), "stretch")(png(stored)))
    assert np.abs(image.astype(int) - decode(stored, size=(16, 16))).max() <= 1


def test_the_crop_takes_the_middle():
    wide = torch.zeros(1, 10, 30)
    wide[..., 10:20] = 1
    assert Preparation(1, (10, 10), "crop")(wide).min() == 1
    assert Preparation(1, (10, 30), "crop")(wide) is wide
    assert Preparation(1, (5, 5), "crop")(wide)[0, 2].tolist() == pytest.approx([1] * 5, abs=0.1)


def test_resizing_is_antialiased():
    stripes = torch.zeros(1, 32, 32)
    stripes[..., ::2] = 1
    assert (Preparation(1, (4, 4))(stripes) - 0.5).abs().max() < 0.05
