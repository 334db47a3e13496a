"""From a file's bytes, or an array, to pixels of 8 bits: every rule of conversion in one place."""

import warnings
from io import BytesIO
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

__all__ = ["RULES", "Fit", "Pixels", "Size", "decode"]

Pixels: TypeAlias = NDArray[np.uint8]
Size: TypeAlias = tuple[int, int]
Fit: TypeAlias = Literal["stretch", "crop"]

RULES = (
    "the first frame of an animation",
    "turned as the EXIF orientation says",
    "transparency over white",
    "palettes and CMYK to RGB, without colour profiles",
    "16-bit grey divided by 257, floating point times 255, both rounded to 8 bits",
    "grey images stay grey where all images are",
)

_16_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def decode(
    data: bytes | NDArray[Any] | Image.Image, *, size: Size | None = None, fit: Fit = "stretch", alpha: bool = False
) -> Pixels:
    """Turn one image into pixels of 8 bits, by the :data:`RULES`.

    Args:
        data: an encoded file; or an array ``(H, W)`` or ``(H, W, C)`` with 1, 3 or 4 channels, uint8, uint16, or
            floating point in [0, 1]; or an image of Pillow's.
        size: height and width to resize to, by Pillow's bicubic filter with antialiasing; ``None`` leaves the size.
        fit: ``"stretch"`` to that size, or ``"crop"`` the middle after scaling the shorter side.
        alpha: keep transparency as a fourth channel, where there is any, instead of laying it over white.

    Returns:
        Shape ``(H, W, 1)`` for grey images, else ``(H, W, 3)``, or ``(H, W, 4)`` with ``alpha``.

    Raises:
        ValueError: if pixels cannot be brought to 8 bits by a stated rule.
        Exception: whatever Pillow's decoders raise on damaged files.

    Example:
        >>> decode(np.array([[0, 65535], [257, 514]], dtype=np.uint16)).squeeze()
        array([[  0, 255],
               [  1,   2]], dtype=uint8)
    """
    image = _open(data, alpha=alpha) if isinstance(data, bytes) else _eight_bits(_image(data), alpha=alpha)
    if size is not None and image.size != (size[1], size[0]):
        image = _resize(image, size, fit)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _open(data: bytes, *, alpha: bool) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oddities that Pillow gets over, such as damaged EXIF data
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(BytesIO(data), formats=_formats()) as image:
            image.load()
            return _eight_bits(ImageOps.exif_transpose(image), alpha=alpha)


def _formats() -> list[str]:
    """All that Pillow reads by itself: for EPS it would start Ghostscript on a file that nobody has looked at."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def _image(array: NDArray[Any] | Image.Image) -> Image.Image:
    if isinstance(array, Image.Image):
        return array
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ValueError(f"an array of shape {array.shape} is no image")
    if array.dtype == np.uint16:
        array = _rounded(array / 257)
    elif array.dtype.kind == "f":
        array = _from_float(array)
    elif array.dtype != np.uint8:
        raise ValueError(f"pixels of type {array.dtype} have no known range")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)


def _eight_bits(image: Image.Image, *, alpha: bool) -> Image.Image:
    """Bring an image of any mode to L or RGB, or to RGBA if its transparency is to be kept."""
    if image.mode in ("L", "RGB") and not image.has_transparency_data:
        return image
    if image.mode in _16_BITS:
        return _from_integers(np.asarray(image))
    if image.mode == "F":
        return Image.fromarray(_from_float(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if alpha:
            return image
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def _from_integers(array: NDArray[Any]) -> Image.Image:
    if array.min() < 0 or array.max() > 65535:
        raise ValueError("32-bit pixels outside 0 … 65535 have no known range")
    return Image.fromarray(_rounded(array / 257))


def _from_float(array: NDArray[Any]) -> Pixels:
    if not np.isfinite(array).all():
        raise ValueError("pixels are NaN or infinite")
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"floating-point pixels lie in [{array.min():.4g}, {array.max():.4g}], not in [0, 1]")
    return _rounded(array * 255)


def _rounded(array: NDArray[Any]) -> Pixels:
    return np.rint(array).astype(np.uint8)


def _resize(image: Image.Image, size: Size, fit: Fit) -> Image.Image:
    size = size[1], size[0]
    if fit == "crop":
        return ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    return image.resize(size, Image.Resampling.BICUBIC)
