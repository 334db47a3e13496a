"""Decoding images to 8-bit pixels, and preparing tensors of one size and number of channels."""

import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

Pixels: TypeAlias = NDArray[np.uint8]
Size: TypeAlias = tuple[int, int]
Fit: TypeAlias = Literal["stretch", "crop"]
Channels: TypeAlias = Literal[1, 3, 4]

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
    """Decode one image to pixels of 8 bits, by the :data:`RULES`.

    Args:
        data: An encoded file; or an array ``(H, W)`` or ``(H, W, C)`` with 1, 3 or 4 channels, uint8, uint16, or
            floating point in [0, 1]; or an image of Pillow's.
        size: Height and width to resize to, by Pillow's bicubic filter with antialiasing; ``None`` leaves the size.
        fit: ``"stretch"`` to that size, or ``"crop"`` the middle after scaling the shorter side.
        alpha: Keep transparency as a fourth channel, where there is any, instead of laying it over white.

    Returns:
        Shape ``(H, W, 1)`` for grey images, else ``(H, W, 3)``, or ``(H, W, 4)`` with ``alpha``.

    Raises:
        ValueError: If pixels cannot be brought to 8 bits by a stated rule.
        Exception: Whatever Pillow's decoders raise on damaged files.

    Example:
        >>> decode(np.array([[0, 65535], [257, 514]], dtype=np.uint16)).squeeze()
        array([[  0, 255],
               [  1,   2]], dtype=uint8)
    """
    image = _open(data, alpha=alpha) if isinstance(data, bytes) else _eight_bits(_image(data), alpha=alpha)
    if size is not None and image.size != (size[1], size[0]):
        resize = ImageOps.fit if fit == "crop" else Image.Image.resize
        image = resize(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _open(data: bytes, *, alpha: bool) -> Image.Image:
    """Decode a file."""
    if not data:
        raise ValueError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Pillow reads all the same, such as damaged EXIF data
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.init()
        formats = [name for name in Image.ID if name != "EPS"]  # for which Pillow would run Ghostscript on the file
        with Image.open(BytesIO(data), formats=formats) as image:
            image.load()
            return _eight_bits(ImageOps.exif_transpose(image), alpha=alpha)


def _image(array: NDArray[Any] | Image.Image) -> Image.Image:
    """Bring an array to 8 bits."""
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
        integers = np.asarray(image)
        if integers.min() < 0 or integers.max() > 65535:
            raise ValueError("32-bit pixels outside 0 … 65535 have no known range")
        return Image.fromarray(_rounded(integers / 257))
    if image.mode == "F":
        return Image.fromarray(_from_float(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return image if alpha else Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def _from_float(array: NDArray[Any]) -> Pixels:
    if not np.isfinite(array).all():
        raise ValueError("pixels are NaN or infinite")
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"floating-point pixels lie in [{array.min():.4g}, {array.max():.4g}], not in [0, 1]")
    return _rounded(array * 255)


def _rounded(array: NDArray[Any]) -> Pixels:
    return np.rint(array).astype(np.uint8)


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

    Example:
        >>> prepare = Preparation(channels=3, size=(4, 4))
        >>> prepare(torch.full((1, 8, 6), 255, dtype=torch.uint8)).shape
        torch.Size([3, 4, 4])
    """

    channels: Channels
    size: Size | None = None
    fit: Fit = "crop"

    def __call__(self, image: Any) -> Tensor:
        """Prepare a tensor ``(C, H, W)``, or anything that :func:`decode` reads."""
        if not isinstance(image, Tensor):
            image = torch.tensor(decode(image, alpha=self.channels == 4)).permute(2, 0, 1)
        if self.size is not None and tuple(image.shape[-2:]) != self.size:
            image = self._resize(image, self.size)
        return to_channels(F.to_dtype(image, torch.float32, scale=True), self.channels)

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
