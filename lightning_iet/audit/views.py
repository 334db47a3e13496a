"""Transformed versions of a generated image, compared as well: a mirrored copy is a copy."""

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Invariance", "View", "views"]

Invariance: TypeAlias = Literal["none", "flip", "shift", "flip+shift"]
View: TypeAlias = Callable[[Tensor], Tensor]


def views(invariance: Invariance) -> Mapping[str, View]:
    """List the versions in which a generated image is compared with the training images.

    Each costs a search of its own, so that ``"flip"`` doubles the time, ``"shift"`` takes 9 times and both 18 times as
    long.

    Args:
        invariance: ``"flip"`` adds the mirrored image, ``"shift"`` the 8 shifts by one pixel, with the border repeated
            *(our choice: no frame of black appears)*.

    Returns:
        By name a function on images, shape ``(N, C, H, W)``; the first leaves them as they are.

    Example:
        >>> list(views("flip")), len(views("flip+shift"))
        (['as it is', 'mirrored'], 18)
    """
    versions: dict[str, View] = {"as it is": lambda images: images}
    if "flip" in invariance:
        versions["mirrored"] = lambda images: images.flip(-1)
    if "shift" not in invariance:
        return versions
    moves = [(dx, dy) for dx in (0, -1, 1) for dy in (0, -1, 1)]
    return {_name(name, *move): _shifted(view, *move) for name, view in versions.items() for move in moves}


def _name(name: str, dx: int, dy: int) -> str:
    if not (dx or dy):
        return name
    shift = f"shifted by ({dx}, {dy})"
    return shift if name == "as it is" else f"{name}, {shift}"


def _shifted(view: View, dx: int, dy: int) -> View:
    def shift(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = F.pad(view(images).float(), (1, 1, 1, 1), mode="replicate").to(images.dtype)
        return padded[..., 1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width]

    return shift if dx or dy else view
