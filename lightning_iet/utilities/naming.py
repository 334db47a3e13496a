"""Names as they can be shown: those of files may hold any byte but zero and the slash."""

__all__ = ["printable"]


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


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # os.fsdecode turns the byte 0xNN into the surrogate U+DCNN
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
