"""Files of images: what tells their format, readers beside Pillow's (HEIC, DICOM, NIfTI), pages, value ranges."""

import gzip
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache, lru_cache
from itertools import islice
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_iet.utilities.errors import require

# --- which values are black and white in images of more than 8 bits ---------------------------------------------------

Range: TypeAlias = tuple[float, float]
ValueRange: TypeAlias = Range | Literal["auto", "full"]

RANGES: dict[str, Range] = {"integers": (0, 65535), "floating point": (0, 1)}
"""The full ranges."""
DEPTHS = (8, 10, 12, 14, 16)  # bits that integers in files of 16 bits are taken to have


def parse_range(text: str | None) -> ValueRange:
    """Read ``auto``, ``full``, or ``LOW:HIGH``.

    Args:
        text: ``"auto"`` (and ``None``) finds out, see :func:`choose_ranges`; ``"full"`` is 0:65535 for integers, 0:1
            for floating point, and for DICOM what its stored bits can hold, whatever its window.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> parse_range("-1:1"), parse_range(None)
        ((-1.0, 1.0), 'auto')
    """
    if text is None or text == "auto":
        return "auto"
    if text == "full":
        return "full"
    number = r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
    match = re.fullmatch(rf"({number}):({number})", str(text))
    if match is None or not float(match[1]) < float(match[2]):
        raise ValueError(
            f"Argument `range` expected the values of black and white, such as 0:4095 or -1:1, or auto, or full, but "
            f"got '{text}'."
        )
    return float(match[1]), float(match[2])


def format_range(value_range: ValueRange) -> str:
    """Write a range as :func:`parse_range` reads it.

    Example:
        >>> format_range((0, 4095)), format_range("full")
        ('0:4095', 'full')
    """
    return value_range if isinstance(value_range, str) else f"{value_range[0]:.9g}:{value_range[1]:.9g}"


def choose_ranges(values: Mapping[str, Range]) -> dict[str, Range]:
    """Find out what is black and white in files of 16 bits, which often hold fewer.

    Scanners write 10 or 12 bits into files of 16 *(our choice: the least of 8, 10, 12, 14 and 16 bits that holds every
    value of the set)*. Sets whose largest values differ by less than a factor of 4 are taken to be of one kind, and
    share a range: so a set whose brightest image happens to be dark is not brightened.

    Args:
        values: By set the least and the largest value, from 0 to 65535.

    Returns:
        By set the values of black and white.

    Example:
        >>> choose_ranges({"train": (0, 4095), "held_out": (0, 1500), "generated": (0, 65535)})
        {'train': (0, 4095), 'held_out': (0, 4095), 'generated': (0, 65535)}
    """
    ranges: dict[str, Range] = {}
    for name, (_, high) in values.items():
        shared = max(other for _, other in values.values() if other < 4 * max(high, 1))
        ranges[name] = 0, next(2**bits - 1 for bits in DEPTHS if shared < 2**bits)
    return ranges


# --- what tells a format ----------------------------------------------------------------------------------------------

Format = Literal["HEIF", "DICOM", "NIfTI"]

EXTRAS: dict[str, str] = {
    ".heic": "heic", ".heif": "heic", ".hif": "heic",
    ".dcm": "medical", ".dicom": "medical", ".ima": "medical", ".nii": "medical", ".nii.gz": "medical",
}  # fmt: skip
"""Suffixes of these formats, and the extra of this package that reads them."""

HEAD = 4096  # bytes that tell the format of a file, and whether it may have several pages
_STUBS = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # known to Pillow by name only, or by running a program
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"\0\0\0\x0cjP  ")


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name in small letters, with both parts of a compressed one.

    Example:
        >>> suffix_of("a/b.PNG"), suffix_of("brain.nii.gz"), suffix_of("v1.2/README"), suffix_of("shard-0.tar.gz")
        ('.png', '.nii.gz', '', '.tar.gz')
    """
    base = name.replace("\\", "/").rpartition("/")[2].lower()
    stem, dot, last = base.rpartition(".")
    if not dot or not stem:
        return ""
    inner = stem.rpartition(".")[2]
    both = last in ("gz", "bz2", "xz", "zst") and inner in ("nii", "tar")
    return f".{inner}.{last}" if both else f".{last}"


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of all formats that can be read, also of those for which an extra is wanted."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset({suffix for suffix, kind in known if kind in Image.OPEN and kind not in _STUBS} | set(EXTRAS))


def format_of(start: bytes) -> Format | None:
    """Tell from the first bytes of a file whether it has one of these formats.

    Example:
        >>> format_of(bytes(4) + b"ftypheic"), format_of(bytes(128) + b"DICM"), format_of(b"BM")
        ('HEIF', 'DICOM', None)
    """
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
        return "HEIF"
    if start[128:132] == b"DICM":
        return "DICOM"
    if start[:2] == b"\x1f\x8b":
        try:
            start = zlib.decompressobj(wbits=31).decompress(start, 400)
        except zlib.error:
            return None
    return "NIfTI" if start[344:348] in (b"n+1\0", b"ni1\0") or start[4:8] in (b"n+2\0", b"ni2\0") else None


def is_image(start: bytes, *, named: bool) -> bool:
    r"""Tell from the first bytes of a file whether it is an image, where its name does not tell.

    Args:
        start: The first :data:`HEAD` bytes, or all.
        named: Whether it has a suffix: TIFF's first bytes are then no proof, since cameras' raw files share them.

    Example:
        >>> is_image(b"GIF89a", named=True), is_image(b"II*\0", named=True), is_image(b"II*\0", named=False)
        (True, False, True)
    """
    if start.startswith(_MAGIC) or (start.startswith(b"RIFF") and start[8:12] == b"WEBP"):
        return True
    return format_of(start) is not None or (not named and start.startswith((b"II*\0", b"MM\0*", b"BM")))


class Values(NamedTuple):
    """An image of more than 8 bits.

    Attributes:
        pixels: Shape ``(H, W)``.
        depth: Whether they are integers, or floating point.
    """

    pixels: NDArray[np.float32]
    depth: Literal["integers", "floating point"]


def open_image(data: bytes) -> Image.Image:
    """Open a file by Pillow, or by pillow-heif, without decoding its pixels.

    Raises:
        ModuleNotFoundError: For HEIC, without pillow-heif.
        Exception: Whatever Pillow raises on damaged files.
    """
    if format_of(data) == "HEIF":
        require("pillow_heif", "heic").register_heif_opener()
        return Image.open(io.BytesIO(data), formats=["HEIF"])
    Image.init()
    formats = [name for name in Image.ID if name != "EPS"]  # for which Pillow would run Ghostscript on the file
    return Image.open(io.BytesIO(data), formats=formats)


# --- DICOM ------------------------------------------------------------------------------------------------------------


def dicom_frames(data: bytes) -> int:
    """Return the number of images in a DICOM file."""
    with warnings.catch_warnings(action="ignore"):
        dataset = _pydicom().dcmread(io.BytesIO(data), specific_tags=["NumberOfFrames"])
    frames = max(int(dataset.get("NumberOfFrames") or 1), 1)
    if frames > len(data):  # one byte for each at least: a list of billions of frames would fill the memory
        raise ValueError(f"the file names {frames:,} frames, but has {len(data):,} bytes")
    return frames


def read_dicom(data: bytes, frame: int, value_range: ValueRange = "auto") -> NDArray[np.uint8] | Values:
    r"""Read one image of a DICOM file as DICOM says that it is shown.

    Grey values are rescaled (slope and intercept, or the modality's table), and a window or table of values of
    interest brings them to 8 bits: of several the first, linear, linear exact or sigmoid (DICOM PS3.3, C.11.1 and
    C.11.2). ``MONOCHROME1``, where small values are bright, is turned around. Colours are RGB.

    Args:
        data: The file.
        frame: Number of the image, from 0.
        value_range: ``"full"`` ignores the window: black and white are the ends of what the stored bits can hold. With
            two rescaled values, such as Hounsfield units, rescaled values are returned, whatever window there is.

    Returns:
        uint8, shape ``(H, W)`` or ``(H, W, 3)``; or :class:`Values` where there is no window or a range is given.
        Without a window they are counted from the least that the unsigned bits can hold, so that they are not negative.

    Raises:
        ModuleNotFoundError: Without pydicom.
        ValueError: If it holds no pixels.
    """
    with warnings.catch_warnings(action="ignore"):  # of what is read all the same
        return _read_dicom(data, frame, value_range)


def _pydicom() -> ModuleType:
    """The package, which says in the log what it says by warnings."""
    pydicom = require("pydicom", "medical")
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    return pydicom


def _read_dicom(data: bytes, frame: int, value_range: ValueRange) -> NDArray[np.uint8] | Values:
    pydicom = _pydicom()
    processing = require("pydicom.pixels", "medical")
    dataset = pydicom.dcmread(io.BytesIO(data))
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ValueError(f"a DICOM file without pixels ({dataset.get('Modality') or 'of no modality'})")
    pixels = processing.pixel_array(dataset, index=frame)
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        pixels = processing.apply_color_lut(pixels, dataset)
        return _eight_bits(pixels, 8 * pixels.dtype.itemsize)
    if not kind.startswith("MONOCHROME"):
        return _eight_bits(pixels, dataset.BitsStored)
    _apply_groups(dataset, frame)
    values = np.asarray(processing.apply_modality_lut(pixels, dataset), dtype=np.float64)
    inverted = kind == "MONOCHROME1"
    if not isinstance(value_range, str):
        shown = sum(value_range) - values if inverted else values
        return Values(shown.astype(np.float32), "floating point")
    if value_range == "full" and "PixelRepresentation" in dataset:
        low, high = (float(end) for end in processing.apply_modality_lut(_ends(dataset), dataset))
        shown = (values - low) / (high - low) * 255
    elif dataset.get("VOILUTSequence"):
        most = 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
        shown = processing.apply_voi(values.astype(np.int64), dataset) / most * 255
    elif dataset.get("WindowCenter") not in (None, "") and dataset.get("WindowWidth") not in (None, ""):
        shown = processing.apply_windowing(values, _window(pydicom.Dataset(), dataset))
    else:
        return _without_window(values, dataset, inverted=inverted)
    done = np.rint(shown.clip(0, 255)).astype(np.uint8)
    return 255 - done if inverted else done


def _eight_bits(pixels: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    return pixels if pixels.dtype == np.uint8 else np.rint(pixels / (2**bits - 1) * 255).clip(0, 255).astype(np.uint8)


def _ends(dataset: Any) -> NDArray[np.int64]:
    """Least and largest value that the stored bits can hold."""
    bits = dataset.BitsStored
    return np.array([0, 2**bits - 1] if dataset.PixelRepresentation == 0 else [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1])


def _window(target: Any, dataset: Any) -> Any:
    """The window alone, to 8 bits."""
    target.PhotometricInterpretation, target.BitsStored, target.PixelRepresentation = "MONOCHROME2", 8, 0
    for name in ("WindowCenter", "WindowWidth", "VOILUTFunction"):
        if dataset.get(name) not in (None, ""):
            setattr(target, name, dataset.get(name))
    return target


def _without_window(values: NDArray[Any], dataset: Any, *, inverted: bool) -> Values:
    if dataset.get("PixelRepresentation") == 0 and "ModalityLUTSequence" not in dataset:
        ends = _ends(dataset) * float(dataset.get("RescaleSlope") or 1)
        values = values - min(float(dataset.get("RescaleIntercept") or 0), 0)
        values = max(ends) - values if inverted else values
    return Values(values.astype(np.float32), "floating point" if "FloatPixelData" in dataset else "integers")


def _apply_groups(dataset: Any, frame: int) -> None:
    """Put rescaling and window of a frame, which files of several frames keep apart, where the others have them."""
    shared, own = dataset.get("SharedFunctionalGroupsSequence"), dataset.get("PerFrameFunctionalGroupsSequence")
    for group in [*(shared or [])[:1], *(own or [])[frame : frame + 1]]:
        for sequence in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in group.get(sequence) or []:
                dataset.update(item)


# --- NIfTI ------------------------------------------------------------------------------------------------------------


def nifti_slices(data: bytes) -> int:
    """Return the number of slices in a NIfTI file: along the third axis, at every time."""
    return _volume(data).shape[2]


def read_nifti(data: bytes, number: int) -> Values:
    """Read one slice of a NIfTI file: across the body's long axis, the patient's left on the right, the nose above.

    Args:
        data: The file, compressed or not.
        number: Of the slice, from 0 at the feet.

    Raises:
        ModuleNotFoundError: Without nibabel.
        ValueError: If its values are no numbers.
    """
    volume = _volume(data)
    pixels = np.rot90(volume[::-1, :, number])  # as slices of DICOM files are shown: the first axis goes to the right
    depth: Literal["integers", "floating point"] = "floating point" if volume.dtype.kind == "f" else "integers"
    return Values(np.ascontiguousarray(pixels, dtype=np.float32), depth)


@lru_cache(maxsize=1)
def _volume(data: bytes) -> NDArray[Any]:
    """The volume, shape ``(X, Y, slices)``, with the axes of the patient: right, anterior, superior."""
    nibabel = require("nibabel", "medical")
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    kind = nibabel.Nifti2Image if data[4:8] == b"n+2\0" else nibabel.Nifti1Image
    volume = np.asanyarray(nibabel.as_closest_canonical(kind.from_bytes(data)).dataobj)
    if volume.dtype.kind not in "uif":
        raise ValueError(f"pixels of type {volume.dtype} have no known range")
    if volume.ndim < 2:
        raise ValueError(f"a volume of shape {volume.shape} has no slices")
    # Slices of one time one after the other, then those of the next time.
    return volume.reshape(*volume.shape[:2], -1, order="F") if volume.ndim != 3 else volume


# --- pages: which are images, and whether the file is whole -----------------------------------------------------------

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


def pages_of(data: bytes) -> Pages:
    """List the pages of a file that are images: the first for most files, and for those that cannot be opened.

    Pages of a TIFF that its tags call a smaller version or a mask of another one are left out.

    Example:
        >>> from io import BytesIO
        >>> file, frame = BytesIO(), Image.new("L", (2, 2))
        >>> frame.save(file, "tiff", save_all=True, append_images=[frame, frame])
        >>> pages_of(file.getvalue())
        Pages(numbers=[0, 1, 2], is_whole=True)
        >>> frame.save(file := BytesIO(), "gif")
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
