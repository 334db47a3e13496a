"""Files that say which caption belongs to which image."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = ["CaptionFile", "read_captions"]

_NAME_KEYS = ("file_name", "image", "file", "path")
_TEXT_KEYS = ("text", "caption", "captions", "prompt")


def read_captions(path: Path) -> dict[str, str]:
    """Read the captions of a ``.jsonl`` file, or of a ``.json`` file.

    A ``.jsonl`` file holds an object per line, such as ``{"file_name": "a.png", "text": "a dog"}``, the form of Hugging
    Face's image folders. A ``.json`` file holds ``{"a.png": "a dog"}`` or ``{"a.png": ["a dog", "dog on grass"]}``, the
    form of LAION-10k in studies of replication, or a list of objects as above. Of several captions the first is taken
    *(our choice: the one that those studies train with)*.

    Args:
        path: The file.

    Returns:
        ``{name of the image: caption}``; an image whose caption is empty has none.

    Raises:
        ValueError: If it is something else, naming the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            entries: Any = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            entries = json.loads(text)
    except (OSError, ValueError) as error:
        raise _broken(path, str(error)) from error
    try:
        pairs = entries.items() if isinstance(entries, Mapping) else [_pair(entry) for entry in entries]
        return {str(name): _first(caption) for name, caption in pairs if _first(caption)}
    except (TypeError, KeyError, AttributeError) as error:
        raise _broken(path, f"{type(error).__name__}: {error}") from error


def _pair(entry: Mapping[str, Any]) -> tuple[str, Any]:
    name = next((entry[key] for key in _NAME_KEYS if key in entry), None)
    if name is None:
        raise KeyError(f"an entry has none of {', '.join(_NAME_KEYS)}")
    return name, next((entry[key] for key in _TEXT_KEYS if entry.get(key)), "")


def _first(captions: Any) -> str:
    caption = captions[0] if isinstance(captions, list) and captions else captions or ""
    if not isinstance(caption, str):
        raise TypeError(f"a caption is {type(caption).__name__}, not text")
    return caption.strip()


def _broken(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"Argument `captions` expected a .jsonl file with `file_name` and `text`, or a .json file "
        f"{{name: captions}}, but got '{path}', which is something else ({reason})."
    )


class CaptionFile:
    """Finds the caption of an image, and what has none.

    Files made elsewhere often name images by paths of that machine: an image is looked up by its path below the folder,
    and where that is not named, by the longest end of a name that no other name has in common.

    Args:
        captions: ``{name: caption}``.

    Example:
        >>> file = CaptionFile({"/home/x/train/a.png": "a dog", "b.png": "a cat"})
        >>> file.of("a.png"), file.of("b.png"), file.of("c.png"), file.unused
        ('a dog', 'a cat', None, [])
    """

    def __init__(self, captions: Mapping[str, str]) -> None:
        self.captions = captions
        self._ends: dict[str, str | None] = {}
        for name in captions:
            for end in _ends(name):
                self._ends[end] = None if end in self._ends else name
        self._used: set[str] = set()

    def of(self, name: str) -> str | None:
        """The caption of an image, by its path below the folder."""
        named = name if name in self.captions else self._ends.get(PurePosixPath(name).as_posix())
        if named is None:
            return None
        self._used.add(named)
        return self.captions[named]

    @property
    def unused(self) -> list[str]:
        """Names for which no image has been looked up."""
        return [name for name in self.captions if name not in self._used]


def _ends(name: str) -> list[str]:
    parts = PurePosixPath(name).parts
    return [str(PurePosixPath(*parts[start:])) for start in range(len(parts))]
