"""Checks of what users pass: images, features, losses."""

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCE = 1e-3  # of values outside [0, 1]: what a cubic filter or a change of units leaves
"""How far floating-point images may leave [0, 1]: a quarter of one of 256 levels, which is rounding, not scale."""


def image_rows(images: Tensor, *, name: str = "images") -> Tensor:
    """Check a batch of images and flatten each of them to one row.

    Args:
        images: shape ``(N, ...)``, uint8, or floating point in [0, 1].
        name: what error messages call the argument.

    Returns:
        Shape ``(N, D)``; uint8 stays uint8 (a quarter of the memory), every floating type becomes float32.

    Raises:
        TypeError: if ``images`` is no tensor, or neither uint8 nor floating point.
        ValueError: if there is no dimension to flatten, or a value is NaN, or outside [0, 1] by more than 0.001, which
            rounding may cause; the message says how to scale values of that range.

    Example:
        >>> image_rows(torch.tensor([[[0.0, 0.5], [1.0, 0.25]]]))
        tensor([[0.0000, 0.5000, 1.0000, 0.2500]])
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"Argument `{name}` expected a tensor, but got {type(images).__name__}. Convert it by torch.as_tensor."
        )
    if images.ndim < 2:
        raise ValueError(
            f"Argument `{name}` expected shape (N, C, H, W), but got {tuple(images.shape)}. "
            "Add the missing dimensions, e.g. by images[None] for a single image."
        )
    if images.dtype != torch.uint8:
        _check_unit_interval(images, name)
        images = images.to(torch.float32)
    return images.flatten(1)


def _check_unit_interval(images: Tensor, name: str) -> None:
    if not images.is_floating_point():
        raise TypeError(
            f"Argument `{name}` expected dtype uint8 or floating point, but got {images.dtype}. "
            "Convert the images by .to(torch.uint8)."
        )
    if images.numel() == 0:
        return
    low, high = (value.item() for value in images.aminmax())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # written so that NaN, which compares false, is refused
        found = "NaN" if low != low else f"values from {low:.4g} to {high:.4g}"
        raise ValueError(f"Argument `{name}` expected values in [0, 1], but got {found}. {_range_remedy(low, high)}")


def _range_remedy(low: float, high: float) -> str:
    """Return what brings values of that range to [0, 1]."""
    if low >= 0 and 2 < high <= 255:
        return "Scale them by images / 255, or pass .to(torch.uint8)."
    if low >= -1 - TOLERANCE and high <= 1 + TOLERANCE:
        return "Scale them by (images + 1) / 2."
    if low == low and high - low < torch.inf:
        return "Scale them by the range that they were made for, the same for all sets."
    return "Scale them to [0, 1], and look at the images that are not finite."


def unit_interval(images: Tensor) -> Tensor:
    """Return images in [0, 1]: uint8 divided by 255, in float32; floating point as it is.

    Args:
        images: any shape, uint8 or floating point.

    Returns:
        The same shape.

    Example:
        >>> unit_interval(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([0.0000, 0.2000, 1.0000])
    """
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images


def check_features(**features: Tensor) -> None:
    """Refuse sets of features, shape ``(N, D)`` each, that cannot be compared; messages name them by their keywords.

    Raises:
        TypeError: if one is no tensor, or not of floating point.
        ValueError: if one has another shape, another width than the first, or values that are not finite.

    Example:
        >>> check_features(generated=torch.rand(3, 8), train=torch.rand(5, 9))
        Traceback (most recent call last):
        ValueError: Argument `train` expected features of the width of `generated`, 8, but got 9. Use one network.
    """
    widths: dict[str, int] = {}
    for name, rows in features.items():
        _check_rows(rows, name)
        widths[name] = rows.shape[1]
        first, width = next(iter(widths.items()))
        if widths[name] != width:
            raise ValueError(
                f"Argument `{name}` expected features of the width of `{first}`, {width}, but got {widths[name]}. "
                "Use one network."
            )


def _check_rows(rows: Tensor, name: str) -> None:
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        found = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(
            f"Argument `{name}` expected a tensor of floating point, but got {found}. Convert it by .float()."
        )
    if rows.ndim != 2:
        raise ValueError(
            f"Argument `{name}` expected features of shape (N, D), but got {tuple(rows.shape)}. "
            "Flatten those of each image."
        )
    broken = ~rows.isfinite().all(dim=1)
    if broken.any():
        raise ValueError(
            f"Argument `{name}` expected finite features, but got NaN or infinity for {broken.sum()} of {len(rows)} "
            f"images, the first of index {broken.int().argmax()}. Look at that image, and at the network."
        )


def check_kinds(kind: type[int] | type[float], **values: object) -> None:
    """Refuse arguments that are no numbers, or no integers; ``None``, which stands for a default, passes.

    Args:
        kind: ``float`` for any number, ``int`` for integers; numbers of NumPy and torch count as well.
        values: What was given, by the names of the arguments.

    Raises:
        TypeError: if one is of another kind.

    Example:
        >>> check_kinds(int, num_shards=2.5)
        Traceback (most recent call last):
        TypeError: Argument `num_shards` expected an integer, but got 2.5.
    """
    method, wanted = ("__index__", "an integer") if kind is int else ("__float__", "a number")
    for name, value in values.items():
        if value is not None and not hasattr(value, method):
            raise TypeError(f"Argument `{name}` expected {wanted}, but got {value!r}.")


def check_at_least(least: int, *, optional: bool = False, **values: int | None) -> None:
    """Refuse integers that are too small.

    Args:
        least: What they are at least.
        optional: Whether ``None``, which then stands for a default, passes.
        values: What was given, by the names of the arguments.

    Raises:
        TypeError: if one is None, and not optional.
        ValueError: with the first that is too small.

    Example:
        >>> check_at_least(1, jobs=0)
        Traceback (most recent call last):
        ValueError: Argument `jobs` expected an integer ≥ 1, but got 0.
    """
    for name, value in values.items():
        if value is None:
            if not optional:
                raise TypeError(f"Argument `{name}` expected an integer ≥ {least}, but got None.")
        elif value < least:
            raise ValueError(f"Argument `{name}` expected an integer ≥ {least}, but got {value}.")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse what is none of some values.

    Raises:
        ValueError: if it is another one.

    Example:
        >>> check_choice("at", "noon", ("round", "half_round"))
        Traceback (most recent call last):
        ValueError: Argument `at` expected one of 'round', 'half_round', but got 'noon'.
    """
    if value not in choices:
        raise ValueError(f"Argument `{name}` expected one of {', '.join(map(repr, choices))}, but got {value!r}.")


def check_number(name: str, value: float, interval: str, remedy: str) -> None:
    """Refuse a number outside an interval such as ``"(0, 1]"``, and NaN; the remedy is a sentence.

    Raises:
        TypeError: if it is no number.
        ValueError: if it lies outside.

    Example:
        >>> check_number("ratio", 0.0, "(0, 1]", "The published one is 1/3.")
        Traceback (most recent call last):
        ValueError: Argument `ratio` expected a number in (0, 1], but got 0.0. The published one is 1/3.
    """
    check_kinds(float, **{name: value})
    if not _inside(value, interval):
        raise ValueError(f"Argument `{name}` expected a number in {interval}, but got {value}. {remedy}")


def check_numbers(name: str, values: Sequence[float], interval: str, remedy: str) -> None:
    """Refuse numbers outside an interval, and such as would give two results one name; as :func:`check_number`.

    Raises:
        ValueError: if one lies outside, or two agree in their first six digits.

    Example:
        >>> check_numbers("rates", (0.1, 0.1), "[0, 1]", "Leave it out.")
        Traceback (most recent call last):
        ValueError: Argument `rates` expected numbers that differ in six digits, but got (0.1, 0.1). Leave it out.
    """
    if not all(_inside(value, interval) for value in values):
        raise ValueError(f"Argument `{name}` expected numbers in {interval}, but got {tuple(values)}. {remedy}")
    if len({f"{value:g}" for value in values}) < len(values):
        raise ValueError(
            f"Argument `{name}` expected numbers that differ in six digits, but got {tuple(values)}. {remedy}"
        )


def _inside(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    below = value <= high if interval[-1] == "]" else value < high
    return above and below  # NaN compares false
