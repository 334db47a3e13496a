"""DICOM, NIfTI and HEIC against what their standards and other readers say."""

import gzip
import sys
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from lightning_iet.data.decoding import Page, Preparation, decode, decode_stored
from lightning_iet.data.formats import format_of, pages_of, suffix_of
from tests.helpers.medical import dicom, nifti

STORED = np.random.default_rng(0).integers(0, 4096, (6, 5), dtype=np.uint16)


@pytest.fixture(autouse=True)
def _extras():
    for name in ("pydicom", "nibabel", "pillow_heif"):
        pytest.importorskip(name, reason="needs the extras `medical` and `heic`")


def windowed(values, center, width):
    """DICOM PS3.3, C.11.2.1.2.1, to 0 ... 255."""
    shown = ((values - (center - 0.5)) / (width - 1) + 0.5) * 255
    shown = np.where(values <= center - 0.5 - (width - 1) / 2, 0, shown)
    return np.rint(np.where(values > center - 0.5 + (width - 1) / 2, 255, shown))


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_hounsfield_units_are_shown_in_their_window(kind):
    data = dicom(STORED, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400,
                 PhotometricInterpretation=kind)  # fmt: skip
    expected = windowed(STORED * 2.0 - 1024, 40, 400)
    expected = 255 - expected if kind == "MONOCHROME1" else expected
    assert np.abs(decode(data, value_range="auto")[..., 0] - expected).max() <= 1
    assert decode_stored(data).kind == "windowed DICOM"
    assert decode_stored(data, value_range="full").kind == decode_stored(data, value_range=(0, 9)).kind == "DICOM"


def test_of_several_windows_the_first_is_taken():
    data = dicom(STORED, WindowCenter=[1000, 50], WindowWidth=[2000, 10])
    assert np.abs(decode(data, value_range="auto")[..., 0] - windowed(STORED.astype(float), 1000, 2000)).max() <= 1


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID"])
def test_other_functions_of_a_window(function):
    data = dicom(STORED, WindowCenter=2000, WindowWidth=1500, VOILUTFunction=function)
    x = (STORED - 2000.0) / 1500
    expected = (x + 0.5).clip(0, 1) * 255 if function == "LINEAR_EXACT" else 255 / (1 + np.exp(-4 * x))
    assert np.abs(decode(data, value_range="auto")[..., 0] - expected).max() <= 1


def test_signed_pixels():
    stored = STORED.astype(np.int16) - 2000
    data = dicom(stored, RescaleIntercept=-24, RescaleSlope=1, WindowCenter=0, WindowWidth=1000)
    assert np.abs(decode(data, value_range="auto")[..., 0] - windowed(stored - 24.0, 0, 1000)).max() <= 1
    with pytest.raises(ValueError, match="which of them are black and white is not known"):
        decode(dicom(stored), value_range="auto")


def test_a_range_goes_before_the_window_and_means_rescaled_values():
    data = dicom(STORED, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    expected = np.rint(((STORED - 1024.0) + 1000).clip(0, 1400) / 1400 * 255)
    assert np.array_equal(decode(data, value_range=(-1000, 400))[..., 0], expected)
    turned = dicom(STORED, RescaleSlope=1, RescaleIntercept=-1024, PhotometricInterpretation="MONOCHROME1")
    assert np.abs(decode(turned, value_range=(-1000, 400))[..., 0] - (255 - expected)).max() <= 1
    whole = np.rint(STORED / 4095 * 255)
    assert np.array_equal(decode(data, value_range="full")[..., 0], whole)


def test_without_a_window_the_range_is_that_of_all_images():
    for more in ({}, {"RescaleSlope": 1, "RescaleIntercept": -1024}):
        found = decode_stored(dicom(STORED, **more))
        assert found.depth == "integers"
        assert np.array_equal(found.pixels[..., 0], STORED)
    inverted = decode_stored(dicom(STORED, PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(inverted.pixels[..., 0], 4095 - STORED)


def test_every_frame_is_an_image_with_a_window_of_its_own():
    frames = np.stack([STORED, STORED[::-1], STORED // 2])
    windows = [(1000, 500), (2000, 900), (500, 300)]
    data = dicom(frames, windows=windows)
    assert pages_of(data).numbers == [0, 1, 2]
    for number, (frame, window) in enumerate(zip(frames, windows, strict=True)):
        assert (
            np.abs(
                decode(Page(data, number), value_range="auto")[..., 0] - windowed(frame.astype(float), *window)
            ).max()
            <= 1
        )


def test_colours():
    colours = np.random.default_rng(1).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    assert np.array_equal(decode(dicom(colours, PhotometricInterpretation="RGB")), colours)


def test_files_without_pixels_and_damaged_ones_say_so():
    with pytest.raises(ValueError, match=r"a DICOM file without pixels \(RTSTRUCT\)"):
        decode(dicom(None, Modality="RTSTRUCT"))
    with pytest.raises(Exception, match=r".+"):
        decode(dicom(STORED)[:300])
    assert pages_of(bytes(128) + b"DICM" + b"x" * 50).numbers == [0]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_slices_of_a_nifti_volume(compressed, version):
    volume = np.random.default_rng(0).integers(0, 4096, (5, 6, 4)).astype(np.int16)
    data = nifti(volume, version=version)
    data = gzip.compress(data) if compressed else data
    assert format_of(data[:4096]) == "NIfTI"
    assert pages_of(data).numbers == [0, 1, 2, 3]
    for number in range(4):
        found = decode_stored(Page(data, number))
        # Columns go from the patient's right to the left, rows from front to back; x to the right, y to the front.
        expected = np.array([[volume[x, y, number] for x in reversed(range(5))] for y in reversed(range(6))])
        assert np.array_equal(found.pixels[..., 0], expected)
        assert found.depth == "integers"


def test_volumes_are_turned_to_the_patients_axes_and_scaled():
    volume = np.random.default_rng(0).integers(0, 200, (5, 6, 4)).astype(np.int16)
    turned = nifti(volume[::-1, ::-1].copy(), affine=np.diag([-1.0, -1, 1, 1]))
    assert np.array_equal(decode_stored(turned).pixels, decode_stored(nifti(volume)).pixels)
    scaled = decode_stored(nifti(volume, slope=0.001))
    assert scaled.depth == "floating point"
    np.testing.assert_allclose(scaled.pixels, decode_stored(nifti(volume)).pixels * 0.001, rtol=1e-5)


def test_times_of_a_nifti_file_follow_one_another():
    volume = np.random.default_rng(0).integers(0, 200, (3, 3, 2, 2)).astype(np.int16)
    data = nifti(volume)
    assert len(pages_of(data).numbers) == 4
    assert np.array_equal(
        decode_stored(Page(data, 3)).pixels, decode_stored(nifti(np.ascontiguousarray(volume[..., 1:, 1]))).pixels
    )


def test_heic_is_read_like_a_png():
    pillow_heif = pytest.importorskip("pillow_heif")
    colours = np.full((32, 48, 3), (200, 40, 90), dtype=np.uint8)
    file = BytesIO()
    pillow_heif.from_pillow(Image.fromarray(colours)).save(file, quality=100)
    assert format_of(file.getvalue()) == "HEIF"
    found = decode(file.getvalue())
    assert found.shape == colours.shape
    assert np.abs(found.astype(int) - colours).max() <= 4
    assert Preparation(3)(file.getvalue()).shape == (3, 32, 48)


@pytest.mark.parametrize(
    ("module", "extra", "data"),
    [
        ("pillow_heif", "heic", bytes(4) + b"ftypheic" + bytes(100)),
        ("pydicom", "medical", bytes(128) + b"DICM" + bytes(100)),
        ("nibabel", "medical", bytes(344) + b"n+1\0" + bytes(100)),
    ],
)
def test_without_the_package_the_extra_is_named(monkeypatch, module, extra, data):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"`{module}` is not installed.*lightning-iet\[{extra}\]"):
        decode(data)


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.b.PNG", ".png"), (".hidden", ""), ("x.tar.gz", ".tar.gz"), ("1.5/x", ""), ("a.gz", ".gz")]
)
def test_suffixes(name, suffix):
    assert suffix_of(name) == suffix
