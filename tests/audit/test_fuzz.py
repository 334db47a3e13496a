"""Truncated, hostile and mixed files: nothing but a reason for each, and a count that is right."""

import random
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.fuzz_readers import (
    CONTAINERS,
    MORE_FORMATS,
    damaged,
    dicom,
    hostile,
    hostile_files,
    read_container,
    read_folder,
)
from lightning_iet.audit import reading
from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.reading import Reading, read_images
from lightning_iet.data.decoding import Page, decode
from lightning_iet.data.formats import pages_of
from lightning_iet.data.samples import reason_of
from lightning_iet.data.sources import left_alone_by, open_source


def encoded(kind, mode="RGB", pages=1, **options):
    generator = np.random.default_rng(len(kind) + pages)
    frames = [
        Image.fromarray(generator.integers(0, 256, (9, 7, 3), dtype=np.uint8)).convert(mode) for _ in range(pages)
    ]
    more = {"save_all": True, "append_images": frames[1:]} if pages > 1 else {}
    file = BytesIO()
    frames[0].save(file, kind, **more, **options)
    return file.getvalue()


def attempt(function, *arguments, **options):
    """The result and no error, or no result and the error."""
    try:
        return function(*arguments, **options), None
    except Exception as error:
        return None, error


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb():
    """A PNG that says it has 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def endless_tiff():
    """A TIFF whose list of pages leads back to its beginning."""
    data = bytearray(encoded("tiff", pages=3))
    first = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, first)[0]
    struct.pack_into("<I", data, first + 2 + 12 * count, first)
    return bytes(data)


WHOLE = {
    "a.png": encoded("png"),
    "b.jpg": encoded("jpeg"),
    "c.tif": encoded("tiff", pages=3),
    "d.gif": encoded("gif", pages=4),
    "e.webp": encoded("webp", pages=2),
    "f.png": encoded("png", mode="P"),
    "g.png": encoded("png", pages=2),
    "h.bmp": encoded("bmp"),
    "i.tif": encoded("tiff", compression="tiff_lzw"),
    "j.ico": encoded("ico", sizes=[(7, 7)]),
    "k.ppm": encoded("ppm"),
    "l.tga": encoded("tga"),
}


@given(
    st.sampled_from(sorted(WHOLE)),
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_decode_to_an_image_or_raise_an_exception(name, cut, changes):
    data = bytearray(WHOLE[name])
    for place, value in changes:
        data[place % len(data)] = value
    data = bytes(data[: 1 + cut % len(data)] if cut % 3 else data)
    numbers = pages_of(data).numbers
    assert numbers
    assert numbers == sorted(set(numbers))
    pixels, error = attempt(decode, data)
    if error is None:
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] in (1, 3)
    else:
        assert reason_of(error)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_bytes_that_begin_like_an_image(tail):
    for head in (b"", b"II*\0", b"MM\0*", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"):
        assert pages_of(head + tail).numbers
        assert attempt(decode, head + tail[:20])[1] is not None


@pytest.mark.parametrize("data", [bomb(), endless_tiff()], ids=["bomb", "endless tiff"])
def test_hostile_files_end(data):
    assert len(pages_of(data).numbers) <= 3
    _, error = attempt(decode, data)
    assert error is None or type(error).__name__ in ("DecompressionBombError", "ValueError", "OSError")


@given(st.lists(st.tuples(st.sampled_from(sorted(WHOLE)), st.integers(0, 3), st.booleans()), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_folder_of_whole_and_damaged_files_is_counted_right(tmp_path_factory, files):
    """Whatever lies in a folder: what is used and what is skipped make up all of it, and whole files are all used."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "images").mkdir()
    whole = 0
    for number, (name, cut, extra) in enumerate(files):
        data = WHOLE[name]
        (folder / "images" / f"{number}{name}").write_bytes(data if cut else data[: len(data) // 2])
        whole += len(pages_of(data).numbers) if cut else 0
        if extra:
            (folder / "images" / f"{number}.txt").write_text("no image")
    source = open_source(folder / "images", argument="train")
    texts = sum(extra for *_, extra in files)
    assert left_alone_by(source) == (f"{texts} .txt" if texts else "")
    cache, how = BlockCache(folder / "cache"), Reading(workers=0, size=(4, 4), fit="stretch")
    found, error = attempt(read_images, source, cache, argument="train", location="here", reading=how)
    if error is not None:
        assert "at least one readable image" in str(error)
        assert not whole
        return
    assert len(found) + len(found.skipped) == len(source)
    assert len(found) >= whole
    assert len(found.names) == len(found.hashes) == len(found.pixels)


# --- containers of several images, and formats of extras --------------------------------------------------------------

EXTRA = {"parquet": "datasets", "heic": "pillow_heif", "dcm": "pydicom", "nii": "nibabel"}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_whole_and_damaged_containers(kind, tmp_path):
    """Of whole ones all images are used; damaged ones are refused in one line, or counted right."""
    pytest.importorskip(EXTRA.get(kind, "numpy"))
    generator, refused, used = random.Random(kind), 0, 0
    for number in range(12 if kind == "parquet" else 45):
        container = CONTAINERS[kind](generator)
        is_whole = number % 3 == 0
        if not is_whole:
            container = container._replace(data=damaged(container.data, generator))
        found = read_container(container, tmp_path, is_whole=is_whole)
        refused, used = refused + bool(found.refused), used + found.used
    assert refused
    assert used


@pytest.mark.parametrize("kind", MORE_FORMATS)
def test_folders_of_whole_and_damaged_files_of_extras(kind, tmp_path):
    pytest.importorskip(EXTRA[kind])
    generator, files = random.Random(kind), {}
    for number in range(45):
        data = MORE_FORMATS[kind](generator)
        files[f"{number}.{kind}"] = damaged(data, generator) if number % 3 else data
    whole = [f"{number}.{kind}" for number in range(0, 45, 3)]
    found = read_folder(files, tmp_path, whole=whole)
    assert not found.refused
    assert found.used >= sum(len(pages_of(files[name]).numbers) for name in whole) >= 15
    assert found.skipped


def test_a_whole_file_that_is_skipped_is_no_plausible_count(tmp_path, monkeypatch):
    files = {"0.png": encoded("png"), "1.jpg": encoded("jpeg"), "2.tif": encoded("tiff", pages=3)}
    (tmp_path / "all").mkdir()
    assert read_folder(files, tmp_path / "all", whole=files).used == 5
    original = reading.decode_stored

    def decode_no_page_but_the_first(data, **options):
        if isinstance(data, Page) and data.number:
            raise ValueError("a fault of the reader")
        return original(data, **options)

    monkeypatch.setattr(reading, "decode_stored", decode_no_page_but_the_first)
    (tmp_path / "few").mkdir()
    with pytest.raises(AssertionError, match=r"of the 3 images of the whole 2\.tif 1 are used"):
        read_folder(files, tmp_path / "few", whole=files)


@pytest.mark.parametrize("name", hostile())
def test_hostile_containers_hold_nothing(name, tmp_path):
    container = hostile()[name]
    pytest.importorskip(EXTRA.get(container.suffix[1:], "numpy"))
    found = read_container(container, tmp_path, is_whole=False)
    assert found.refused.startswith("Argument `train` expected")
    assert len(found.refused) < 600
    assert "\n" not in found.refused.strip()


def test_hostile_files_hold_nothing(tmp_path):
    pytest.importorskip("pydicom")
    found = read_folder(hostile_files(), tmp_path, whole=())
    assert found.used == 0
    assert "billions of frames.dcm" in found.refused


def test_a_file_that_names_billions_of_frames_is_one_image():
    """A list of all its pages would fill the memory."""
    pytest.importorskip("pydicom")
    assert pages_of(dicom(random.Random(0), frames=3)).numbers == [0, 1, 2]
    assert pages_of(dicom(random.Random(0), frames=1, claimed=2**31 - 1)).numbers == [0]
