import struct
import warnings
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from lightning_iet.data.decoding import decode, decode_stored
from tests.helpers.pictures import png_of_16_bits

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
GREYS = COLOURS[..., 0]


def encoded(image, kind="png", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_grey_and_colour_images_stay_as_they_are():
    assert np.array_equal(decode(encoded(Image.fromarray(COLOURS))), COLOURS)
    assert np.array_equal(decode(encoded(Image.fromarray(GREYS))), GREYS[..., None])


def test_black_and_white_becomes_grey():
    image = Image.fromarray(GREYS > 127)
    assert image.mode == "1"
    assert np.array_equal(decode(encoded(image)), np.where(GREYS > 127, 255, 0)[..., None])


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bit_grey_is_divided_by_257(kind):
    deep = GREYS.astype(np.uint16) * 257
    assert np.array_equal(decode(encoded(Image.fromarray(deep), kind)), GREYS[..., None])


def test_32_bit_integers_of_unknown_range_are_refused():
    assert np.array_equal(decode(encoded(Image.fromarray(GREYS.astype(np.int32) * 257), "tiff")), GREYS[..., None])
    with pytest.raises(ValueError, match="integer pixels lie in"):
        decode(encoded(Image.fromarray(GREYS.astype(np.int32) * 100_000), "tiff"))


def test_transparency_lies_over_white():
    pixels = np.dstack([COLOURS, GREYS])
    expected = np.rint((COLOURS * (GREYS[..., None] / 255.0)) + 255 - GREYS[..., None])
    assert np.abs(decode(encoded(Image.fromarray(pixels))).astype(int) - expected).max() <= 1
    grey_alpha = Image.fromarray(np.dstack([GREYS, np.zeros_like(GREYS)]), "LA")
    assert (decode(encoded(grey_alpha)) == 255).all()


def test_palettes_become_colours_and_their_transparency_white():
    image = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert decode(encoded(image))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert decode(encoded(image, transparency=1))[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert decode(encoded(image, "tiff"))[0, 0].tolist() == [255, 0, 0]


def test_images_are_turned_as_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = decode(encoded(Image.fromarray(COLOURS), exif=exif))
    assert np.array_equal(turned, np.rot90(COLOURS, -1))


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("L", (3, 3), shade) for shade in (0, 255)]
    assert (decode(encoded(frames[0], "gif", save_all=True, append_images=frames[1:])) == 0).all()


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]))))
def test_arrays_are_read_as_their_files_are(pixels):
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    assert np.array_equal(decode(pixels), decode(encoded(image)))


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_the_type_of_an_array_does_not_matter(pixels):
    expected = pixels[..., None]
    for same in (pixels, pixels.astype(np.uint16) * 257, pixels / 255, (pixels / 255).astype(np.float32)):
        assert np.array_equal(decode(same), expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), "no image"),
        (np.zeros((4, 4), np.int64), "no known range"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.full((4, 4), 1.5), "not in"),
    ],
)
def test_arrays_without_a_rule_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        decode(array)


def test_resizing_stretches_or_crops():
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    assert decode(wide, size=(10, 10), fit="crop").min() == 255
    stretched = decode(wide, size=(10, 30 // 3))
    assert stretched.shape == (10, 10, 3)
    assert stretched[:, 0].max() == 0
    expected = np.asarray(Image.fromarray(wide).resize((10, 10), Image.Resampling.BICUBIC))
    assert np.array_equal(stretched, expected)


@pytest.mark.parametrize("cut", [0, 5, 30])
def test_damaged_files_raise(cut):
    whole = encoded(Image.fromarray(COLOURS))
    with pytest.raises(Exception, match=r"empty|identify|truncated|broken|cannot"):
        decode(whole[:cut])


def test_truncated_pixels_raise():
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "jpeg")
    with pytest.raises(OSError, match="truncated"):
        decode(whole[: len(whole) // 2])


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # 30 pixels are more, but not twice as many
    with pytest.raises(Image.DecompressionBombWarning):
        decode(encoded(Image.fromarray(COLOURS)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(Image.DecompressionBombError):
        decode(encoded(Image.fromarray(COLOURS)))


def test_no_other_program_is_started(monkeypatch):
    """Pillow would run Ghostscript on EPS."""
    with pytest.raises(OSError, match="identify"):
        decode(encoded(Image.fromarray(COLOURS), "eps"))


def test_warnings_of_others_stay_as_they_were():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(encoded(Image.fromarray(COLOURS)))
        warnings.warn("seen", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["seen"]


# --- 16 bits in colour, and transparency of more than 8 bits ----------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("value_range", ["auto", (0, 4095)])
def test_files_whose_lower_8_bits_pillow_drops_are_refused(channels, value_range):
    """Colours of 12 bits would be 16 levels."""
    deep = np.random.default_rng(0).integers(0, 4096, (6, 5, channels), dtype=np.uint16)
    with pytest.raises(ValueError, match=r"^colours of 16 bits, of which only the upper 8 .* `range` full"):
        decode(png_of_16_bits(deep), value_range=value_range)
    with pytest.raises(ValueError, match=r"^colours of 16 bits"):
        decode(Image.open(BytesIO(png_of_16_bits(deep))), value_range=value_range)


def test_so_are_tiff_of_16_bits():
    tags = {256: 2, 257: 2, 258: 122, 259: 1, 262: 2, 273: 128, 277: 3, 278: 2, 279: 24}
    entries = [struct.pack("<HHII", tag, 3, 3 if tag == 258 else 1, value) for tag, value in tags.items()]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    data = head + struct.pack("<HHH", 16, 16, 16) + bytes(range(24))
    assert decode(data)[0, :, 0].tolist() == [1, 7]  # the upper bytes
    with pytest.raises(ValueError, match=r"^colours of 16 bits"):
        decode(data, value_range="auto")


def test_of_full_16_bits_the_upper_8_are_enough():
    deep = np.random.default_rng(0).integers(0, 65536, (6, 5, 3), dtype=np.uint16)
    for value_range in ("full", (0, 65535)):
        found = decode(png_of_16_bits(deep), value_range=value_range)
        assert np.abs(found - deep / 257).max() <= 1
    assert np.array_equal(decode(png_of_16_bits(deep[..., :1]))[..., 0], np.rint(deep[..., 0] / 257))


def test_pixels_of_16_bits_in_all_are_of_8_bits_a_colour():
    """BMP with 5 or 6 bits a colour names its pixels "BGR;16"."""
    size, head = 2 * 4 * 4, struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 16, 3, 32, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    data = b"BM" + struct.pack("<IHHI", 66 + size, 0, 0, 66) + head + masks + b"\xff" * size
    assert (decode(data, value_range="auto") == 255).all()


@pytest.mark.parametrize("value_range", ["auto", "full", (-1.0, 1.0)])
def test_transparency_in_floating_point_is_checked_like_colours(value_range):
    pixels = np.random.default_rng(0).random((6, 5, 4))
    pixels[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        decode(pixels, value_range=value_range)
    pixels[0, 0] = -1
    if isinstance(value_range, str):
        with pytest.raises(ValueError, match=r"lie in \[-1, .* which of them are black and white is not known"):
            decode(pixels, value_range=value_range)
    else:
        eight_bits = np.rint((pixels + 1) / 2 * 255).astype(np.uint8)
        assert np.array_equal(decode(pixels, value_range=value_range), decode(eight_bits))


def test_transparency_in_integers_has_the_range_that_is_given():
    deep = np.random.default_rng(0).integers(0, 4096, (6, 5, 4), dtype=np.uint16)
    with pytest.raises(ValueError, match=r"^integers of more than 8 bits with transparency: .* give `range`"):
        decode(deep, value_range="auto")
    for value_range, top in (((0, 4095), 4095), ("full", 65535)):
        eight_bits = np.rint(deep / top * 255).astype(np.uint8)
        assert np.array_equal(decode(deep, value_range=value_range), decode(eight_bits))
    with pytest.raises(ValueError, match="integer pixels lie in"):
        decode_stored(deep.astype(np.int64) * 1000, value_range="full")
