"""Decoding images to 8-bit pixels, and preparing tensors of one size and number of channels."""

import re
import struct
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lightning_iet.data.formats import (
    MISSING,
    RANGES,
    Range,
    ValueRange,
    Values,
    check_page,
    format_of,
    open_image,
    read_dicom,
    read_nifti,
)
from lightning_iet.functional.checks import TOLERANCE

Pixels: TypeAlias = NDArray[np.uint8]
Size: TypeAlias = tuple[int, int]
Fit: TypeAlias = Literal["stretch", "crop"]
Channels: TypeAlias = Literal[1, 3, 4]
Background: TypeAlias = Literal["white", "black"]
Depth: TypeAlias = Literal["8 bits", "integers", "floating point"]
Stored: TypeAlias = "bytes | Page | NDArray[Any] | Image.Image"

WINDOWED = "windowed DICOM"
"""The kind of images whose values beyond the window that their file names are lost."""

RULES = (
    "every page of a file is an image, such as those of a TIFF stack or the frames of an animation",
    "turned as the EXIF orientation says",
    "transparency over one colour, white unless another is given",
    "palettes and CMYK to RGB, without colour profiles",
    "DICOM rescaled and shown in its first window, NIfTI slice by slice",
    "images of more than 8 bits from their range to 0 ... 255, rounded",
    "grey images stay grey where all images are",
)

HALF_READ = "colours of 16 bits, of which only the upper 8 can be read: say `range` full if white is 65535"
"""Why images that Pillow reads without saying that it drops half of their bits are refused."""

_16_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class Page(NamedTuple):
    """One of the images in a file."""

    data: bytes
    number: int


class Decoded(NamedTuple):
    """An image before it is brought to 8 bits.

    Attributes:
        pixels: Shape ``(H, W, C)``: uint8, or float32 with the stored values where there are more than 8 bits.
        depth: ``"8 bits"``, ``"integers"`` or ``"floating point"``.
        size: Height and width as stored, before resizing.
        kind: Pillow's name of the file's format, or ``"array"``.
        transparent: Whether a pixel is transparent.
    """

    pixels: NDArray[Any]
    depth: Depth
    size: Size
    kind: str
    transparent: bool


def parse_size(text: int | str | None) -> Size | None:
    """Read a size of images, such as ``64`` or ``64x48`` (width x height).

    Returns:
        Height and width; ``None`` if there is none.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> parse_size(64), parse_size("64x48"), parse_size(None)
        ((64, 64), (48, 64), None)
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", str(text))
    if match is None:
        raise ValueError(
            f"Argument `image_size` expected a size such as 64 or 64x48 (width x height), but got '{text}'."
        )
    return int(match[2] or match[1]), int(match[1])


def decode(
    data: Stored,
    *,
    size: Size | None = None,
    fit: Fit = "stretch",
    alpha: bool = False,
    background: Background = "white",
    value_range: ValueRange = "full",
) -> Pixels:
    """Decode one image to pixels of 8 bits, by the :data:`RULES`.

    Args:
        data: An encoded file, of which the first page is taken, or a :class:`Page` of one; or an array ``(H, W)`` or
            ``(H, W, C)`` with 1, 3 or 4 channels, of integers or floating point; or an image of Pillow's.
        size: Height and width to resize to, by Pillow's bicubic filter with antialiasing; ``None`` leaves the size.
        fit: ``"stretch"`` to that size, or ``"crop"`` the middle after scaling the shorter side.
        alpha: Keep transparency as a fourth channel, where there is any, instead of laying it over the background.
        background: Colour under transparent pixels.
        value_range: Values of black and white in images of more than 8 bits: ``"full"`` = 0 and 65535 for integers, 0
            and 1 for floating point. Values beyond them become black or white. ``"auto"`` refuses integers, whose range
            only a look at all images tells. Files of 16 bits in colour or with transparency are read with the full
            range only, since Pillow drops the lower 8. Transparency in arrays of more than 8 bits has the same range.

    Returns:
        Shape ``(H, W, 1)`` for grey images, else ``(H, W, 3)``, or ``(H, W, 4)`` with ``alpha``.

    Raises:
        ValueError: If pixels cannot be brought to 8 bits by a stated rule.
        Exception: Whatever Pillow's decoders raise on damaged files.

    Example:
        >>> decode(np.array([[0, 65535], [257, 514]], dtype=np.uint16)).squeeze()
        array([[  0, 255],
               [  1,   2]], dtype=uint8)
        >>> decode(np.array([[0, 4095]], dtype=np.uint16), value_range=(0, 4095)).squeeze()
        array([  0, 255], dtype=uint8)
    """
    if isinstance(data, np.ndarray) and data.dtype.kind in "ui" and data.dtype.itemsize > 2 and value_range == "full":
        raise ValueError(f"pixels of type {data.dtype} have no known range")  # 0 ... 255 in 64 bits would be black
    found = decode_stored(data, size=size, fit=fit, alpha=alpha, background=background, value_range=value_range)
    if found.depth == "8 bits":
        return found.pixels
    if value_range == "auto" and found.depth == "integers":
        raise ValueError("pixels of more than 8 bits have no known range before all are read: give `range`")
    return to_eight_bits(found.pixels, RANGES[found.depth] if isinstance(value_range, str) else value_range)


def decode_stored(
    data: Stored,
    *,
    size: Size | None = None,
    fit: Fit = "stretch",
    alpha: bool = False,
    background: Background = "white",
    value_range: ValueRange = "auto",
) -> Decoded:
    """Decode one image, and leave values of more than 8 bits as they are stored; see :func:`decode`."""
    kind = "array"
    image: NDArray[Any] | Image.Image | Values
    if isinstance(data, bytes | Page):
        image, kind = _open(data, value_range)
    else:
        image = data if isinstance(data, Image.Image) else _image(data, value_range)
    pixels: NDArray[Any]
    depth: Depth
    if isinstance(image, Image.Image):
        _check_bits(image, value_range)  # of one that Pillow has opened, but not read yet
    if isinstance(image, Values):
        pixels, depth, transparent = image.pixels[..., None], image.depth, False
    else:
        pixels, depth, transparent = _native(image, alpha=alpha, background=background)
    if depth != "8 bits":
        _check_values(pixels, depth, None if isinstance(value_range, str) else value_range)
    stored: Size = pixels.shape[0], pixels.shape[1]
    if size is not None and stored != size:
        low, high = pixels.min(), pixels.max()
        # Bicubic weights are negative in places: values beyond those stored would be taken for more bits.
        pixels = _resize(pixels, size, fit).clip(low, high) if depth != "8 bits" else _resize(pixels, size, fit)
    return Decoded(pixels, depth, stored, kind, transparent)


def to_eight_bits(values: NDArray[Any], value_range: Range) -> Pixels:
    """Map values from a range to 0 … 255; those beyond its ends become black or white.

    Example:
        >>> to_eight_bits(np.array([-1.0, 0.0, 0.5, 1.0]), (-1, 1))
        array([  0, 128, 191, 255], dtype=uint8)
    """
    low, high = value_range
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def _open(data: bytes | Page, value_range: ValueRange) -> tuple[Image.Image | NDArray[Any] | Values, str]:
    """Decode a page of a file."""
    data, number = data if isinstance(data, Page) else (data, 0)
    if not data:
        raise ValueError("the file is empty")
    if format_of(data) == "DICOM":
        found = read_dicom(data, number, value_range)
        if isinstance(found, Values):
            return found, "DICOM"
        return _image(found, value_range), WINDOWED if found.ndim == 2 and value_range == "auto" else "DICOM"
    if format_of(data) == "NIfTI":
        return read_nifti(data, number), "NIfTI"
    check_page(data, number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Pillow reads all the same, such as damaged EXIF data
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with open_image(data) as image:
            kind = image.format or "unknown"
            if number:
                _seek(image, number)
            _check_bits(image, value_range)
            image.load()
            return ImageOps.exif_transpose(image), kind


def _seek(image: Image.Image, number: int) -> None:
    try:
        image.seek(number)
    except (EOFError, IndexError, TypeError, struct.error) as error:  # whose messages speak of the reader
        raise ValueError(MISSING) from error


def _check_bits(image: Image.Image, value_range: ValueRange) -> None:
    """Refuse an image whose lower 8 of 16 bits Pillow drops as it decodes, unless they are of no account."""
    if value_range in ("full", RANGES["integers"]) or image.mode in _16_BITS:
        return
    # How pixels lie in the file, such as "RGB;16B"; without the order of bytes 16 bits are those of a whole pixel.
    if any(re.search(r";16[BLN]", str(tile[3])) for tile in getattr(image, "tile", ())):
        raise ValueError(HALF_READ)


def _image(array: NDArray[Any], value_range: ValueRange) -> NDArray[Any] | Image.Image:
    """Check the shape and the type of an array."""
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        raise ValueError(f"an array of shape {array.shape} is no image")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype.kind not in "uif":
        raise ValueError(f"pixels of type {array.dtype} have no known range")
    if channels == 4 and array.dtype != np.uint8:  # transparency needs 8 bits
        depth: Depth = "floating point" if array.dtype.kind == "f" else "integers"
        given = None if isinstance(value_range, str) else value_range
        if depth == "integers" and value_range == "auto":
            raise ValueError(
                "integers of more than 8 bits with transparency: which of them are black and white is not known, give "
                "`range`"
            )
        _check_values(array, depth, given)
        array = to_eight_bits(array, given or RANGES[depth])
    if array.dtype != np.uint8:
        return array
    return Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)


def _native(
    image: NDArray[Any] | Image.Image, *, alpha: bool, background: Background
) -> tuple[NDArray[Any], Depth, bool]:
    """Bring an image of any mode to L, RGB, or RGBA if its transparency is to be kept; deep ones to their values."""
    if isinstance(image, Image.Image) and (image.mode in _16_BITS or image.mode == "F"):
        image = np.asarray(image)
    if not isinstance(image, Image.Image):
        depth: Depth = "floating point" if image.dtype.kind == "f" else "integers"
        return image.reshape(*image.shape[:2], -1).astype(np.float32), depth, False
    transparent = False
    if image.has_transparency_data:
        image = image.convert("RGBA")
        transparent = bool(np.asarray(image.getchannel("A")).min() < 255)
        if not alpha:
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1), "8 bits", transparent


def _check_values(values: NDArray[Any], depth: Depth, value_range: Range | None) -> None:
    """Refuse values of which nobody can tell how bright they are."""
    if not np.isfinite(values).all():
        raise ValueError("pixels are NaN or infinite")
    low, high = RANGES[depth]
    slack = TOLERANCE if depth == "floating point" else 0
    if value_range is None and (values.min() < low - slack or values.max() > high + slack):
        name = "floating-point" if depth == "floating point" else "integer"
        raise ValueError(
            f"{name} pixels lie in [{values.min():.4g}, {values.max():.4g}], not in [{low:g}, {high:g}]: "
            "which of them are black and white is not known"
        )


def _resize(pixels: NDArray[Any], size: Size, fit: Fit) -> NDArray[Any]:
    """Resize by Pillow: colours together, deep values channel by channel."""
    if pixels.dtype == np.uint8:
        planes = [Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)]
    else:
        planes = [Image.fromarray(pixels[..., channel]) for channel in range(pixels.shape[2])]
    resize = ImageOps.fit if fit == "crop" else Image.Image.resize
    done = [np.asarray(resize(plane, (size[1], size[0]), Image.Resampling.BICUBIC)) for plane in planes]
    return done[0].reshape(*size, -1) if len(done) == 1 else np.stack(done, axis=2)


@dataclass(frozen=True)
class Preparation:
    """Turns one image into a tensor, float32 in [0, 1], shape ``(C, H, W)``.

    Files, arrays and Pillow's images are decoded by :func:`decode`, as for an audit. Sizes are changed by a bicubic
    filter with antialiasing, that of torchvision.

    Args:
        channels: 1 for grey, 3 for colour, 4 for colour with transparency.
        size: Height and width; ``None`` leaves the size.
        fit: ``"crop"`` scales the image until it covers the size and takes the middle; ``"stretch"`` changes its
            proportions.
        value_range: Values of black and white in images of more than 8 bits, see :func:`decode`.

    Example:
        >>> prepare = Preparation(channels=3, size=(4, 4))
        >>> prepare(torch.full((1, 8, 6), 255, dtype=torch.uint8)).shape
        torch.Size([3, 4, 4])
    """

    channels: Channels
    size: Size | None = None
    fit: Fit = "crop"
    value_range: ValueRange = "full"

    def __call__(self, image: Any) -> Tensor:
        """Prepare a tensor ``(C, H, W)``, or anything that :func:`decode` reads."""
        image = _stored(image)
        if not isinstance(image, Tensor):
            pixels = decode(image, alpha=self.channels == 4, value_range=self.value_range)
            return self._finish(torch.tensor(pixels).permute(2, 0, 1))
        if image.is_floating_point() and not isinstance(self.value_range, str):
            low, high = self.value_range
            image = ((image - low) / (high - low)).clamp(0, 1)
        return self._finish(image)

    def measured(self, image: Any) -> tuple[Tensor, Depth, Range]:
        """Prepare an image, and return its depth and its least and largest stored value besides.

        Where the range is to be found out (``"auto"``), integers are prepared by their own.
        """
        image = _stored(image)
        if isinstance(image, Tensor):
            return self(image), "8 bits", (0, 255)
        found = decode_stored(image, alpha=self.channels == 4, value_range=self.value_range)
        values = float(found.pixels.min()), float(found.pixels.max())
        if found.depth == "8 bits":
            return self._finish(torch.tensor(found.pixels).permute(2, 0, 1)), found.depth, values
        if self.value_range != "auto" or found.depth == "floating point":
            return self(image), found.depth, values
        pixels = to_eight_bits(found.pixels, (0, max(values[1], 1)))
        return self._finish(torch.tensor(pixels).permute(2, 0, 1)), found.depth, values

    def _finish(self, image: Tensor) -> Tensor:
        if self.size is not None and tuple(image.shape[-2:]) != self.size:
            image = self._resize(image, self.size)
        return to_channels(within_unit_interval(F.to_dtype(image, torch.float32, scale=True)), self.channels)

    def _resize(self, image: Tensor, size: Size) -> Tensor:
        target = size
        if self.fit == "crop":
            height, width = image.shape[-2:]
            scale = max(size[0] / height, size[1] / width)
            target = max(size[0], round(height * scale)), max(size[1], round(width * scale))
        resized = F.resize(image, list(target), interpolation=InterpolationMode.BICUBIC, antialias=True)
        # Bicubic weights are negative in places: floating point can leave [0, 1], 8 bits cannot.
        resized = resized.clamp(0, 1) if resized.is_floating_point() else resized
        return F.center_crop(resized, list(size))


def _stored(image: Any) -> Any:
    """An array in the place of a tensor of integers of more than 8 bits, whose range is a question like a file's."""
    if isinstance(image, Tensor) and not image.is_floating_point() and image.dtype not in (torch.uint8, torch.bool):
        return image.permute(1, 2, 0).numpy() if image.ndim == 3 else image.numpy()
    return image


def within_unit_interval(images: Tensor) -> Tensor:
    """Round values that lie outside [0, 1] by a rounding error into it; others are left for checks to refuse.

    Example:
        >>> within_unit_interval(torch.tensor([0.5, 1.0001])), within_unit_interval(torch.tensor([0.5, 1.1]))
        (tensor([0.5000, 1.0000]), tensor([0.5000, 1.1000]))
    """
    if not images.numel():
        return images
    low, high = (float(value) for value in images.aminmax())
    is_near = min(low, 0) >= -TOLERANCE and max(high, 1) <= 1 + TOLERANCE
    return images.clamp(0, 1) if is_near and (low < 0 or high > 1) else images


def to_channels(image: Tensor, channels: Channels) -> Tensor:
    """Give an image another number of channels.

    Args:
        image: Float in [0, 1], shape ``(C, H, W)`` with 1, 3 or 4 channels.
        channels: How many it shall have. Transparency is laid over white, colours become grey by ITU-R 601's weights,
            and what had no transparency is opaque.

    Returns:
        Shape ``(channels, H, W)``.

    Raises:
        ValueError: If the image has another number of channels.

    Example:
        >>> image = torch.tensor([1.0, 0, 0, 0.5]).view(4, 1, 1)  # half of a red
        >>> to_channels(image, 3).flatten(), to_channels(image, 1).shape
        (tensor([1.0000, 0.5000, 0.5000]), torch.Size([1, 1, 1]))
    """
    if len(image) == channels:
        return image
    if len(image) not in (1, 3, 4):
        raise ValueError(f"an image has 1, 3 or 4 channels, not {len(image)}")
    if len(image) == 4:
        image = 1 - image[3:] * (1 - image[:3])
    if channels == 1:
        return F.rgb_to_grayscale(image)
    colours = image.expand(3, -1, -1)
    return colours if channels == 3 else torch.cat([colours, torch.ones_like(image[:1])])
