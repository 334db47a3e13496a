"""Captions of images: in one list, in lists in each folder, or in a text file beside each image."""

import csv
import io
import json
import logging
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_iet.data.samples import Skip, listed
from lightning_iet.utilities.errors import require

log = logging.getLogger(__name__)

LISTS = (
    "metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet",
    "captions.jsonl", "captions.json", "captions.csv", "captions.tsv", "captions.parquet",
)  # fmt: skip
"""Names under which a list of captions is found in a folder."""
LIST_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXTS = (".txt", ".caption")
"""Suffixes of a text file beside an image."""
TEXT_KEYS = ("text", "caption", "captions", "prompt")
_NAME_KEYS = (
    "file_name", "image", "file", "path", "filename", "image_path", "file_path", "filepath", "image_name", "img",
)  # fmt: skip


def first_caption(captions: Any) -> str:
    """Return the first of several captions that is not empty, *(our choice: the one that studies of LAION train with)*.

    Args:
        captions: A text, a list of texts, or None.

    Raises:
        TypeError: If it is something else.

    Example:
        >>> first_caption([" a dog ", "dog on grass"]), first_caption("a cat"), first_caption(None)
        ('a dog', 'a cat', '')
    """
    if captions is None or isinstance(captions, str):
        return (captions or "").strip()
    if isinstance(captions, Iterable) and not isinstance(captions, bytes | Mapping):
        return next((text for text in map(first_caption, captions) if text), "")
    raise TypeError(f"a caption is {type(captions).__name__}, not text")


def read_captions(path: Path, *, key: str | None = None) -> dict[str, str]:
    """Read a list of captions.

    - ``.jsonl``: an object per line, such as ``{"file_name": "a.png", "text": "a dog"}``, as in Hugging Face's image
      folders; ``.csv``, ``.tsv`` and ``.parquet``: columns of these names.
    - ``.json``: ``{"a.png": "a dog"}`` or ``{"a.png": ["a dog", "dog on grass"]}``, the form of LAION-10k in studies of
      replication; a list of objects as above; or COCO's ``images`` and ``annotations``.

    Of several captions, in one entry or in several, the first is taken. The loader of ``datasets`` for image folders
    leaves images without a caption out without a word.

    Args:
        path: The file.
        key: Which entry of an object is the caption; ``None`` = ``text``, ``caption``, ``captions`` or ``prompt``.

    Returns:
        ``{name of the image: caption}``; an image whose caption is empty has none.

    Raises:
        ModuleNotFoundError: For Parquet without ``pyarrow``, which the extra ``audit`` brings.
        ValueError: If it is something else, naming the line, or no entry has such a key, naming those that there are.
    """
    captions: dict[str, str] = {}
    try:
        for name, caption in _pairs(_entries(path), key):
            if caption and name not in captions:
                captions[name] = caption
    except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        reason = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"Argument `captions` expected a .jsonl, .csv or .parquet file with `file_name` and `text`, or a .json "
            f"file {{name: captions}}, but got '{path}', which is something else ({reason})."
        ) from error
    return captions


def _entries(path: Path) -> Any:
    """The objects in a file, or the one object of a .json file."""
    if path.suffix == ".parquet":
        require("pyarrow", "audit")
        try:
            return require("pyarrow.parquet", "audit").read_table(path).to_pylist()
        except Exception as error:  # pyarrow has kinds of its own
            raise ValueError(" ".join(str(error).split())) from error
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if path.suffix in (".csv", ".tsv", ".txt"):
        header, *_ = text.splitlines() or [""]
        # Rows end where a line does, not at a form feed or one of Unicode's separators inside a caption.
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t|", key=header.count), strict=True)
        return [{str(name).strip(): value for name, value in row.items()} for row in rows]
    entries = json.loads(text)
    if isinstance(entries, Mapping) and {"images", "annotations"} <= entries.keys():  # COCO's
        names = {image["id"]: image["file_name"] for image in entries["images"]}
        return [{**entry, "file_name": names[entry["image_id"]]} for entry in entries["annotations"]]
    return entries


def _pairs(entries: Any, key: str | None) -> list[tuple[str, str]]:
    """Names and captions of all entries."""
    keys = TEXT_KEYS if key is None else (key,)
    if isinstance(entries, Mapping):
        pairs = [(str(name), _caption(value, keys) if isinstance(value, Mapping) else value)
                 for name, value in entries.items()]  # fmt: skip
        return [(name, first_caption(caption)) for name, caption in pairs]
    found = [(_name(entry), first_caption(_caption(entry, keys))) for entry in entries]
    if entries and not any(key in entry for entry in entries for key in keys):
        there = ", ".join(dict.fromkeys(str(key) for entry in entries for key in entry))
        raise ValueError(f"its entries have {there}, and none of {', '.join(keys)}; say which one with `caption_key`")
    return found


def _name(entry: Mapping[str, Any]) -> str:
    name = next((entry[key] for key in _NAME_KEYS if entry.get(key) is not None), None)
    if name is None:
        raise KeyError(f"an entry has none of {', '.join(_NAME_KEYS)}")
    return str(name)


def _caption(entry: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((entry[key] for key in keys if entry.get(key)), "")


class CaptionFile:
    r"""Finds the caption of an image, and captions without an image.

    Files made elsewhere often name images by paths of that machine: an image is looked up by its path below the folder,
    or else by the end of a name, where no other name ends in the same way. Backslashes are read as slashes, and letters
    with an accent are the same whether they are one character or two (Unicode's forms NFC and NFD).

    Args:
        captions: ``{name: caption}``.
        images: Paths below the folder of all images: a caption under the whole name of one is no other image's.

    Example:
        >>> file = CaptionFile({"/home/x/train/a.png": "a dog", "b.png": "a cat", "x\\c.png": "an emu"})
        >>> file.of("a.png"), file.of("b.png"), file.of("x/c.png"), file.of("d.png"), file.unused
        ('a dog', 'a cat', 'an emu', None, [])
    """

    def __init__(self, captions: Mapping[str, str], images: Collection[str] = ()) -> None:
        self.captions = captions
        self._images = {str(_canonical(name)) for name in images}
        self._ends: dict[str, str | None] = {}
        for name in captions:
            parts = _canonical(name).parts
            for start in range(len(parts)):
                end = str(PurePosixPath(*parts[start:]))
                self._ends[end] = None if end in self._ends else name
        # A whole name goes before the end of another one.
        whole: dict[str, list[str]] = {}
        for name in captions:
            whole.setdefault(str(_canonical(name)), []).append(name)
        self._ends |= {name: found[0] if len(found) == 1 else None for name, found in whole.items()}
        self._used: set[str] = set()

    def of(self, name: str) -> str | None:
        """Return the caption of an image, by its path below the folder."""
        own = str(_canonical(name))
        named = name if name in self.captions else self._ends.get(own)
        if named is None or ((whole := str(_canonical(named))) != own and whole in self._images):
            return None
        self._used.add(named)
        return self.captions[named]

    @property
    def unused(self) -> list[str]:
        """Return the names for which no image has been looked up."""
        return [name for name in self.captions if name not in self._used]


def _canonical(name: str) -> PurePosixPath:
    return PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def find_captions(
    folder: Path, images: Sequence[str], names: Sequence[str], *, given: Path | None, key: str | None, option: str
) -> list[str | None]:
    """Find the captions of the images in a folder: in a list that is given, in lists in the folders, or beside them.

    Args:
        folder: Of the images.
        images: Their paths below the folder.
        names: Of all files in the folder and below, these images among them.
        given: A list of captions; ``None`` = look for the :data:`LISTS` in the folder and below, each with names
            relative to its own place, and else for a text file beside each image.
        key: See :func:`read_captions`.
        option: Name of the argument that gives the list.

    Returns:
        One for each image, or None.

    Raises:
        FileNotFoundError: If there are no captions.
        ValueError: If one folder holds several lists, or a list cannot be read.
    """
    lists = _lists(folder, names, option) if given is None else [Path(given)]
    texts = {} if given is not None else _texts(images, names)
    if not lists and texts:
        return _beside(folder, images, texts, option)
    if not lists or not lists[0].is_file():
        tried = ", ".join(f"'{folder / name}'" for name in LISTS) if given is None else f"'{given}'"
        beside = f", nor files {' or '.join(TEXTS)} beside the images" if given is None else ""
        raise FileNotFoundError(
            f"Argument `{option}` expected a file of captions, but got {given}, and there is no {tried}{beside}. "
            "Give its path."
        )
    if texts:
        log.warning("Captions are read from '%s'; %d text files beside images are left alone.", lists[0], len(texts))
    captions: dict[str, str] = {}
    for path in lists:
        place = PurePosixPath() if given is not None else PurePosixPath(path.relative_to(folder).parent.as_posix())
        captions |= {str(place / name): caption for name, caption in read_captions(path, key=key).items()}
    file = CaptionFile(captions, images)
    conditions = [file.of(name) for name in images]
    if file.unused:  # no error, for one file may hold the captions of several folders
        lost = [Skip(name, "no such image") for name in file.unused]
        log.warning("%d captions belong to no image in '%s': %s.", len(lost), folder, listed(lost))
    return conditions


def _lists(folder: Path, names: Sequence[str], option: str) -> list[Path]:
    """The lists of captions in a folder and below, at most one in each."""
    found: dict[Path, Path] = {}
    for path in (folder / name for name in names if PurePosixPath(name).name in LISTS):
        if path.parent in found:
            raise ValueError(
                f"Argument `{option}` expected to say which list of captions is meant, since '{path.parent}' holds "
                f"{found[path.parent].name} and {path.name}, but got None. Give one of them."
            )
        found[path.parent] = path
    return sorted(found.values(), key=lambda path: len(path.parts))


def _texts(images: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """By image the text files beside it: of the same name with another suffix, or with one more."""
    texts = {name for name in names if PurePosixPath(name).suffix.lower() in TEXTS}
    by_stem: dict[str, list[str]] = {}
    for name in sorted(texts):
        by_stem.setdefault(name[: -len(PurePosixPath(name).suffix)], []).append(name)
    found: dict[str, list[str]] = {}
    for image in images:
        stem = image[: len(image) - len(PurePosixPath(image).suffix)]
        beside = [*by_stem.get(stem, []), *by_stem.get(image, [])]
        if beside:
            found[image] = beside
    return found


def _beside(folder: Path, images: Sequence[str], texts: Mapping[str, Sequence[str]], option: str) -> list[str | None]:
    """Captions in text files, one beside an image at most: the first line of each that is not empty."""
    for image, beside in texts.items():
        if len(beside) > 1:
            raise ValueError(
                f"Argument `{option}` expected one text file beside each image, but got {' and '.join(beside)} beside "
                f"'{image}'. Remove one, or give a list of captions."
            )
    captions: list[str | None] = []
    several = 0
    for image in images:
        lines: list[str] = []
        for name in texts.get(image, ()):
            try:
                text = (folder / name).read_text(encoding="utf-8-sig")
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"Argument `{option}` expected text files in UTF-8, but got '{folder / name}', which cannot be "
                    f"read ({error})."
                ) from error
            lines = [line.strip() for line in text.splitlines() if line.strip()]
        several += len(lines) > 1
        captions.append(lines[0] if lines else None)
    if several:
        log.warning("%d text files in '%s' have several lines; the first line is the caption.", several, folder)
    return captions
