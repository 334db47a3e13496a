"""Images as data URIs, small enough that a page may hold hundreds of them."""

from base64 import b64encode
from io import BytesIO

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import resize, to_pil_image

__all__ = ["PIXELATED", "data_uri", "shrink"]

PIXELATED = 64  # pixels up to which an image is stored as it is, and shown with its pixels as squares
LARGEST = 160  # pixels of a thumbnail: a card of the gallery shows it at about 110, a phone at 165


def data_uri(pixels: Tensor, *, largest: int = LARGEST) -> str:
    """Encode an image: without loss if it is small, else reduced and as JPEG.

    Args:
        pixels: uint8, shape ``(C, H, W)``, grey or RGB.
        largest: width and height that a reduced image has at most.

    Returns:
        A ``data:`` address.

    Example:
        >>> import torch
        >>> data_uri(torch.zeros(1, 8, 8, dtype=torch.uint8))[:30]
        'data:image/png;base64,iVBORw0K'
    """
    image, file = to_pil_image(pixels), BytesIO()
    kind = "png" if max(image.size) <= PIXELATED else "jpeg"
    if kind == "png":
        image.save(file, "png", optimize=True)
    else:
        image.thumbnail((largest, largest), Image.Resampling.BICUBIC)
        image.save(file, "jpeg", quality=80)
    return f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"


def shrink(images: Tensor, side: int) -> Tensor:
    """Reduce images, shape ``(N, C, H, W)`` and uint8, to at most ``side`` pixels; smaller ones stay."""
    height, width = images.shape[-2:]
    if max(height, width) <= side:
        return images
    factor = side / max(height, width)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    return resize(images, list(size), antialias=True)
