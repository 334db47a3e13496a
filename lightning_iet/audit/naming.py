"""Names of images for spreadsheets, which take some of them for formulas."""

from lightning_iet.utilities.naming import printable

__all__ = ["for_spreadsheets"]

_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # the wide ones count as well


def for_spreadsheets(name: str) -> str:
    """Write a name so that no spreadsheet takes it for a formula: with an apostrophe before it, where it needs one.

    Names that begin with an apostrophe get one as well, so that taking one away always gives the name.

    Args:
        name: any name.

    Returns:
        As :func:`printable`, safe in a cell.

    Example:
        >>> for_spreadsheets("=1+1.png"), for_spreadsheets("'.png"), for_spreadsheets("1.png")
        ("'=1+1.png", "''.png", '1.png')
    """
    shown = printable(name)
    return f"'{shown}" if shown.startswith((*_FORMULA, "'")) else shown
