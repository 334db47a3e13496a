"""Every page of a file is an image, and none of a file that is cut off is lost in silence."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, features

from lightning_iet.data import ImageFolderDataModule
from lightning_iet.data.decoding import Page, decode
from lightning_iet.data.formats import HEAD, may_have_pages, pages_of
from lightning_iet.data.sources import open_source

PAGES = np.random.default_rng(0).integers(0, 256, (6, 9, 7), dtype=np.uint8)


def saved(kind, pages=PAGES, **options):
    first, *rest = map(Image.fromarray, pages)
    file = BytesIO()
    first.save(file, kind, save_all=True, append_images=rest, **options)
    return file.getvalue()


def outcome(data):
    """The pages that can be decoded, and those that cannot."""
    found, missing = {}, []
    for number in pages_of(data).numbers:
        try:
            found[number] = decode(Page(data, number))[..., 0]
        except Exception:
            missing.append(number)
    return found, missing


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("tiff", {}),
        ("tiff", {"big_tiff": True}),
        ("tiff", {"compression": "tiff_lzw"}),
        ("gif", {"optimize": False}),
        ("png", {}),
    ],
)
def test_a_file_that_is_cut_off_lacks_pages(kind, options):
    whole = saved(kind, **options)
    found, missing = outcome(whole)
    assert pages_of(whole) == (list(range(6)), True)
    assert not missing
    for number, page in enumerate(PAGES):
        assert np.array_equal(found[number], page)
    last = len(whole) - 20  # where GIF and PNG have no more than a part of the last page
    for cut in range(60, last, last // 60):
        found, missing = outcome(whole[:cut])
        assert missing, f"{cut} of {len(whole)} bytes"
        for number, pixels in found.items():
            assert np.array_equal(pixels, PAGES[number])


def directories(data):
    """Where the lists of tags of a TIFF of Pillow's begin."""
    places, place = [], struct.unpack_from("<I", data, 4)[0]
    while place:
        places.append(place)
        place = struct.unpack_from("<I", data, place + 2 + 12 * struct.unpack_from("<H", data, place)[0])[0]
    return places


def with_tag(data, page, tag, value):
    data = bytearray(data)
    start = directories(data)[page]
    places = [start + 2 + 12 * n for n in range(struct.unpack_from("<H", data, start)[0])]
    place = next(place for place in places if struct.unpack_from("<H", data, place)[0] == tag)
    struct.pack_into("<H", data, place + 8, value)
    return bytes(data)


def test_a_page_that_cannot_be_read_hides_no_other():
    found, missing = outcome(with_tag(saved("tiff"), 2, 262, 32803))  # a photometric interpretation of raw files
    assert missing == [2]
    assert sorted(found) == [0, 1, 3, 4, 5]


def test_smaller_versions_are_no_images(tmp_path):
    data = saved("tiff", PAGES[:2], tiffinfo={254: 1})
    for smaller in (0, 1):
        (tmp_path / "a.tif").write_bytes(with_tag(data, 1 - smaller, 254, 0))
        source = open_source(tmp_path, argument="train")
        assert len(source) == 1
        assert np.array_equal(decode(source.read(0))[..., 0], PAGES[1 - smaller])


def test_a_list_of_pages_that_leads_back_ends():
    data = bytearray(saved("tiff", PAGES[:3]))
    first, *_, last = directories(data)
    struct.pack_into("<I", data, last + 2 + 12 * struct.unpack_from("<H", data, last)[0], first)
    assert pages_of(bytes(data)) == ([0, 1, 2], True)


def test_a_number_of_frames_that_no_file_could_hold_is_not_believed():
    data = saved("png")
    place = data.index(b"acTL") + 4
    assert struct.unpack_from(">I", data, place)[0] == 6
    chunk = b"acTL" + struct.pack(">II", 2**30, 0)
    claimed = data[: place - 4] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[place + 12 :]
    assert len(pages_of(claimed).numbers) <= 7
    assert not pages_of(claimed).is_whole


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_frames_of_avif_are_images():
    data = saved("avif", quality=100, subsampling="4:4:4")
    assert may_have_pages(data[:HEAD])
    assert pages_of(data) == (list(range(6)), True)
    found, missing = outcome(data)
    assert not missing
    assert np.abs(np.stack(list(found.values())).astype(int) - PAGES).max() < 16


def test_an_animation_behind_a_large_profile_is_one(tmp_path):
    """PNG may have anything before it says that it is animated."""
    noise = np.random.default_rng(1).bytes(6000)  # which nothing compresses
    (tmp_path / "a.png").write_bytes(saved("png", icc_profile=noise))
    assert len(open_source(tmp_path, argument="train")) == 6


@pytest.mark.parametrize("kind", ["tiff", "gif"])
def test_training_refuses_a_file_that_is_cut_off(tmp_path, kind):
    (tmp_path / f"a.{kind}").write_bytes(saved(kind))
    (tmp_path / f"b.{kind}").write_bytes(saved(kind)[: len(saved(kind)) // 2])
    with pytest.raises(ValueError, match=rf"expected images that can all be used, but got .*'b\.{kind}, page \d"):
        ImageFolderDataModule(tmp_path, num_control=1, num_reference=1).setup("fit")
