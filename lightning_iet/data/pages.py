"""The pages of a file: which of them are images, and whether the file is whole."""

import struct
import warnings
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

from PIL import Image

from lightning_iet.data.formats import dicom_frames, format_of, nifti_slices, open_image

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PAGED = (*_TIFF, b"GIF8", b"RIFF")
_TRAILER, _EXTENSION, _FRAME = 0x3B, 0x21, 0x2C  # bytes with which blocks of GIF begin
_AVIF = (b"ftypavif", b"ftypavis")
_SUBFILE, _NO_IMAGE = 254, 0b101  # the tag of TIFF that says what a page is: a smaller version, or a mask, of another

MISSING = "the file is cut off or damaged before this page"


class Pages(NamedTuple):
    """What a file holds.

    Attributes:
        numbers: Of its images, see :class:`~lightning_iet.data.decoding.Page`. Where the file is cut off, the last one
            stands for what is missing, and cannot be decoded.
        is_whole: Whether these are all.
    """

    numbers: list[int]
    is_whole: bool = True


def may_have_pages(start: bytes) -> bool:
    """Tell from the first bytes of a file, 4,096 of them suffice, whether it may hold several images.

    Example:
        >>> may_have_pages(b"GIF89a"), may_have_pages(b"BM")
        (True, False)
    """
    if start.startswith(b"\x89PNG"):  # an animated one says so before its first data, which may lie far behind
        data = start.find(b"IDAT")
        return data < 0 or b"acTL" in start[:data]
    if format_of(start) is not None or start[4:12] in _AVIF:
        return True
    return start.startswith(_PAGED) and not (start.startswith(b"RIFF") and start[8:12] != b"WEBP")


def page_numbers(data: bytes) -> list[int]:
    """List the pages of a file that are images; see :func:`pages_of`.

    Example:
        >>> from io import BytesIO
        >>> file, frame = BytesIO(), Image.new("L", (2, 2))
        >>> frame.save(file, "tiff", save_all=True, append_images=[frame, frame])
        >>> page_numbers(file.getvalue())
        [0, 1, 2]
    """
    return pages_of(data).numbers


def pages_of(data: bytes) -> Pages:
    """List the pages of a file that are images: the first for most files, and for those that cannot be opened.

    Pages of a TIFF that its tags call a smaller version or a mask of another one are left out.

    Args:
        data: The file's bytes.

    Returns:
        The pages.

    Example:
        >>> from io import BytesIO
        >>> file, frame = BytesIO(), Image.new("L", (2, 2))
        >>> frame.save(file, "gif")
        >>> pages_of(file.getvalue()), pages_of(file.getvalue()[:-1])
        (Pages(numbers=[0], is_whole=True), Pages(numbers=[0, 1], is_whole=False))
    """
    if not may_have_pages(data):
        return Pages([0])
    if data.startswith(_TIFF):
        return _pages_of_tiff(data)
    if data.startswith(b"GIF8"):
        return _pages_of_gif(data)
    try:
        counts = {"DICOM": dicom_frames, "NIfTI": nifti_slices}.get(str(format_of(data)))
        if counts is not None:
            return Pages(list(range(counts(data))))
        with warnings.catch_warnings(action="ignore"), open_image(data) as image:
            return _counted(image, most=len(data))
    except Exception:  # decoders raise whatever damaged bytes provoke; decoding tells what it is
        return Pages([0])


def check_page(data: bytes, number: int) -> None:
    """Refuse a page of a TIFF or GIF that is cut off where Pillow would fill up what is missing.

    Of a list of tags that ends early the rest would have their defaults.

    Args:
        data: A file of any format.
        number: Of the page.

    Raises:
        ValueError: If the file ends before the page does.
    """
    is_missing = False
    if data.startswith(_TIFF):
        is_missing = None in islice(_directories(data), number + 1)
    elif data.startswith(b"GIF8") and data[-1] != _TRAILER:
        pages = _pages_of_gif(data)
        is_missing = not pages.is_whole and number == pages.numbers[-1]
    if is_missing:
        raise ValueError(MISSING)


def _counted(image: Image.Image, *, most: int) -> Pages:
    """Take the number of frames that a file names, unless that cannot be: then go from frame to frame."""
    with suppress(Exception):  # decoders raise whatever damaged bytes provoke
        count = getattr(image, "n_frames", 1)
        if count <= most:  # one byte for each at least: a list of billions of frames would fill the memory
            return Pages(list(range(max(count, 1))))
    numbers = [0]
    try:
        while True:
            numbers.append(numbers[-1] + 1)
            image.seek(numbers[-1])
    except Exception:
        return Pages(numbers, is_whole=False)


# --- TIFF -------------------------------------------------------------------------------------------------------------


def _pages_of_tiff(data: bytes) -> Pages:
    kinds = list(_directories(data))
    numbers = [number for number, kind in enumerate(kinds) if kind is None or not kind & _NO_IMAGE]
    return Pages(numbers or [0], is_whole=None not in kinds)


def _directories(data: bytes) -> Iterator[int | None]:
    """What each page of a TIFF is, by its tag "NewSubfileType"; ``None`` ends the list where the file is cut off.

    Pillow opens each page to count them, and stops at one that it cannot read.
    """
    order = "<" if data.startswith(b"II") else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    count_type, offset_type, entry_size = ("Q", "Q", 20) if is_big else ("H", "I", 12)

    def number_at(place: int, kind: str) -> int | None:
        size = struct.calcsize(kind)
        return int(struct.unpack_from(order + kind, data, place)[0]) if place + size <= len(data) else None

    offset, seen = number_at(8 if is_big else 4, offset_type), set[int]()
    while offset != 0:
        if offset in seen:  # the first page again, as some programs end a list
            return
        entries = None if offset is None else number_at(offset, count_type)
        if offset is None or entries is None:
            break
        seen.add(offset)
        start = offset + struct.calcsize(count_type)
        end = start + entries * entry_size
        if end > len(data):
            break
        tags = struct.iter_unpack(f"{order}HH{entry_size - 4}s", data[start:end])
        yield next((_value(order, kind, rest, is_big=is_big) for tag, kind, rest in tags if tag == _SUBFILE), 0)
        offset = number_at(end, offset_type)
    else:
        return
    yield None


def _value(order: str, kind: int, rest: bytes, *, is_big: bool) -> int:
    """The value of a tag of one integer: behind its count, as 16 bits, or as more of which the first 32 count."""
    place = 8 if is_big else 4
    return int(struct.unpack_from(order + ("H" if kind == 3 else "I"), rest, place)[0])


# --- GIF --------------------------------------------------------------------------------------------------------------


def _pages_of_gif(data: bytes) -> Pages:
    """Count the frames whose data are whole, going from block to block up to the trailer."""
    frames, place = 0, 13 + _table(data, 10)
    while place < len(data) and data[place] != _TRAILER:
        is_frame = data[place] == _FRAME
        if data[place] not in (_EXTENSION, _FRAME):
            place += 1  # what is no block is passed over, as Pillow does
            continue
        place += 11 + _table(data, place + 9) if is_frame else 2
        while place < len(data) and data[place]:
            place += data[place] + 1
        frames += is_frame and place < len(data)
        place += 1
    is_whole = place < len(data)
    return Pages(list(range(max(frames + (not is_whole), 1))), is_whole)


def _table(data: bytes, place: int) -> int:
    """Bytes of the table of colours that follows flags at a place."""
    flags = data[place] if place < len(data) else 0
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
