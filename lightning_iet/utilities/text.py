"""Numbers in the text that people read."""


def percent(share: float | None) -> str:
    """Write a share in per cent: one decimal, or two significant digits below 0.1%.

    Args:
        share: In [0, 1]; ``None`` = not known.

    Example:
        >>> [percent(share) for share in (0.914, 1, 0.0, 0.0004, 0.0000123, None)]
        ['91.4%', '100.0%', '0.0%', '0.04%', '0.0012%', '–']
    """
    if share is None:
        return "–"
    return f"{100 * share:.2g}%" if 0 < share < 0.001 else f"{share:.1%}"


def three_digits(number: float | None) -> str:
    """Write a number with three significant digits.

    Example:
        >>> [three_digits(number) for number in (1.4, 0.01234, 123.4, None)]
        ['1.40', '0.0123', '123', '–']
    """
    return "–" if number is None else f"{number:#.3g}".rstrip(".")
