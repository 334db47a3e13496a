"""Names of images, as they can be shown: file names may hold any byte but zero and the slash."""

__all__ = ["for_spreadsheets", "printable"]

_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # the wide ones count as well


def printable(name: str) -> str:
    r"""Write a name so that it fits on one line and can be encoded as UTF-8.

    Bytes that are no UTF-8 (which Python keeps as surrogates), line breaks, and marks that turn the direction of
    writing around, are shown as escapes. Other characters stay as they are: quoting them is up to whoever writes HTML.

    Args:
        name: as ``os.fsdecode`` returns it.

    Returns:
        The name, safe to print.

    Example:
        >>> printable("caf\udce9\n.png"), printable("été <b>.png")
        ('caf\\xe9\\n.png', 'été <b>.png')
    """
    return "".join(character if character.isprintable() else _escape(character) for character in name)


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


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # os.fsdecode turns the byte 0xNN into the surrogate U+DCNN
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
