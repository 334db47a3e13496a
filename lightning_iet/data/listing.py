"""Which files in a folder are images, and what is left alone."""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from lightning_iet.data.formats import HEAD, image_suffixes, is_image, suffix_of

# What operating systems, network drives and tools keep among a person's files: thumbnails, bins, indices.
_SYSTEM_FOLDERS = {
    "@eadir", "@__thumb", "@recycle", "@recently-snapshot", "@sharesnapshot", "@tmp", "#recycle", "#snapshot",
    "$recycle.bin", "system volume information", "lost+found", "found.000", "__macosx", "__pycache__",
    "network trash folder", "temporary items", "thumbnails.db",
}  # fmt: skip
_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "dicomdir", "picasa.ini"}
# Never looked into: they are known not to be images.
_OTHERS = {
    ".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".html", ".parquet", ".tar",
    ".zip", ".npz", ".npy", ".pt", ".safetensors", ".py", ".ipynb", ".pdf", ".idx", ".log",
}  # fmt: skip

# What may hold images all the same: containers, other formats of images, films, microscopes' and cameras' raw files.
_MAY_HOLD = {
    ".npy", ".npz", ".mat", ".h5", ".hdf5", ".pt", ".pth", ".pkl", ".pickle", ".parquet", ".arrow", ".tfrecord",
    ".tfrecords", ".mdb", ".lmdb", ".beton", ".zip", ".7z", ".rar", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz",
    ".tar.zst", ".jxl", ".jxr", ".exr", ".hdr", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".raf",
    ".raw", ".mha", ".mhd", ".nrrd", ".mgz", ".svs", ".ndpi", ".czi", ".lif", ".nd2", ".mp4", ".avi", ".mov", ".mkv",
    ".webm",
}  # fmt: skip


def is_system(name: str) -> bool:
    """Whether a path lies in what a system keeps for itself: hidden files, bins, thumbnails of network drives.

    Example:
        >>> [is_system(n) for n in ("a/b.png", "a/._b.png", "@eaDir/b.png", "x/$RECYCLE.BIN/1.png", "Thumbs.db")]
        [False, True, True, True, True]
    """
    *folders, last = PurePosixPath(name.replace("\\", "/")).parts or ("",)
    return is_system_entry(last, is_folder=False) or any(is_system_entry(part, is_folder=True) for part in folders)


def is_system_entry(name: str, *, is_folder: bool) -> bool:
    """Whether a file or folder of this name belongs to the system; see :func:`is_system`."""
    if name.startswith(".") and name not in (".", ".."):
        return True
    if is_folder:
        return name.lower() in _SYSTEM_FOLDERS or name == "RECYCLER"
    return name.lower() in _SYSTEM_FILES or name.startswith("~$")


@dataclass(frozen=True)
class Listing:
    """The files in a folder and below, in order of name.

    Symbolic links are followed, each folder is visited once, so that links in a circle come to an end.

    Attributes:
        folder: Where they are.
        files: Paths below it, without what the system keeps for itself.
        system: How many files the system keeps, by the folder or file that says so.
    """

    folder: Path
    files: list[str]
    system: Counter[str] = field(default_factory=Counter)

    def head(self, name: str) -> bytes:
        """Return the first bytes of a file; only of a regular one, since reading from a pipe could wait for ever."""
        return read_regular(os.path.join(self.folder, name), HEAD)

    def images(self) -> tuple[list[str], Counter[str]]:
        """Return the images by name, and how many other files there are of each suffix.

        A file is an image if its suffix is one of a format that can be read, or else, unless it is known to be
        something else, if its first bytes are those of an image.
        """
        chosen: list[str] = []
        others: Counter[str] = Counter()
        for name in self.files:
            suffix = suffix_of(name)
            if suffix in image_suffixes() or (suffix not in _OTHERS and self._looks_like_one(name, suffix)):
                chosen.append(name)
            else:
                others[suffix] += 1
        return chosen, others

    def _looks_like_one(self, name: str, suffix: str) -> bool:
        try:
            return is_image(self.head(name), named=bool(suffix))
        except OSError:  # it may be one: it is listed as an image that cannot be read
            return True
        except ValueError:
            return False


def list_folder(folder: Path) -> Listing:
    """List the files in a folder and below."""
    listing = Listing(folder, [])
    for name in _walk(os.fspath(folder), set(), listing):
        listing.files.append(os.path.relpath(name, folder))
    listing.files.sort(key=os.fsencode)
    return listing


def _walk(folder: str, visited: set[tuple[int, int]], listing: Listing) -> Iterator[str]:
    """Paths of the files in a folder and below."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        # Sorted, so that of two ways to one folder always the same is taken.
        for entry in sorted(entries, key=lambda entry: os.fsencode(entry.name)):
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link that leads to itself: listed as an image that cannot be read
                is_folder = False
            if is_system_entry(entry.name, is_folder=is_folder):
                # Hidden files are everywhere; only what has a name of its own is worth a word.
                if not entry.name.startswith("."):
                    listing.system[entry.name] += sum(len(files) for *_, files in os.walk(entry.path)) or 1
            elif is_folder:
                yield from _walk(entry.path, visited, listing)
            else:
                yield entry.path


def read_regular(path: str, most: int = -1) -> bytes:
    """Return the bytes of a regular file, or the first of them.

    Raises:
        ValueError: If it is a pipe or a device, from which reading could wait for ever.
        OSError: If it cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        return file.read(most)


def left_alone(others: Counter[str], system: Counter[str] | None = None, excluded: int = 0) -> str:
    """Say in a few words what was left alone: files by suffix, those of the system by what says so, and excluded ones.

    Example:
        >>> left_alone(Counter({".txt": 12, "": 1}), Counter({"@eaDir": 24}))
        '12 .txt, 1 without a suffix, 24 in @eaDir'
    """
    parts = [f"{number:,} {suffix or 'without a suffix'}" for suffix, number in others.most_common(8)]
    if len(others) > 8:
        parts.append(f"{sum(others.values()) - sum(n for _, n in others.most_common(8)):,} of other kinds")
    parts += [
        f"{number:,} in {name}" if name.lower() in _SYSTEM_FOLDERS else name for name, number in (system or {}).items()
    ]
    return ", ".join([*parts, *([f"{excluded:,} by `exclude`"] if excluded else [])])


def may_hold_images(names: Iterable[str]) -> Counter[str]:
    """Count by suffix the files that are not read as images, but may hold some: arrays, archives, films.

    Example:
        >>> may_hold_images(["a.npy", "a.txt", "b.NPY"])
        Counter({'.npy': 2})
    """
    return Counter(suffix for suffix in map(suffix_of, names) if suffix in _MAY_HOLD)


def without_companions(names: Iterable[str], images: Iterable[str]) -> list[str]:
    """Leave out what belongs to an image: files in its folder whose names begin with its own, as latents of it do.

    Example:
        >>> without_companions(["a/1.npz", "a/1_sdxl.npz", "a/10.npz", "b/1.npz"], ["a/1.png"])
        ['a/10.npz', 'b/1.npz']
    """
    stems = {name[: len(name) - len(suffix_of(name))] for name in images}
    end = re.compile(r"[-_. ](?=[^/\\]*$)|$")
    return [name for name in names if not any(name[: match.start()] in stems for match in end.finditer(name))]


def without_excluded(names: Sequence[str], patterns: Iterable[str]) -> list[str]:
    """Leave out the names that fit a pattern, as a whole or by their last part.

    Example:
        >>> without_excluded(["a/1.png", "a/1_mask.png", "b/1.png"], ["*_mask.png", "b/*"])
        ['a/1.png']
    """
    chosen = list(patterns)
    return [
        name
        for name in names
        if not any(fnmatch(name, pattern) or fnmatch(PurePosixPath(name).name, pattern) for pattern in chosen)
    ]


# --- what must not be mixed -------------------------------------------------------------------------------------------

_TRAIN = {"train", "training", "trn"}
_HELD_OUT = {"val", "valid", "validation", "dev", "test", "testing", "tst", "eval", "evaluation", "heldout", "holdout"}
_PICTURES = {"image", "images", "img", "imgs", "photo", "photos", "jpegimages", "rgb", "input", "inputs"}
_MASKS = {
    "mask", "masks", "seg", "segmentation", "segmentations", "segmentationclass", "gt", "groundtruth", "label",
    "labels", "annotation", "annotations", "depth", "depths",
}  # fmt: skip
_MASK = re.compile(rf"(?P<stem>.+)[-_. ](?:{'|'.join(sorted(_MASKS))})(?:[-_ ]?\d+)?", re.IGNORECASE)


def splits_among(names: Iterable[str]) -> tuple[str, str] | None:
    """Find a folder to train on beside one to hold out, among paths of files with slashes.

    They are of one kind if their names are the same but for the word: ``train`` and ``val``, ``seg_train`` and
    ``seg_test``, ``train2017`` and ``val2017``, ``trainA`` and ``testA``.

    Example:
        >>> splits_among(["a/train/1.png", "a/Test/1.png"]), splits_among(["train/1.png", "bus/1.png"])
        (('a/train', 'a/Test'), None)
    """
    found: dict[tuple[str, str], dict[bool, str]] = {}
    for folder in sorted({str(parent) for name in names for parent in PurePosixPath(name).parents}):
        path = PurePosixPath(folder)
        for rest, is_train in _split_words(path.name):
            kinds = found.setdefault((str(path.parent), rest), {})
            kinds.setdefault(is_train, folder)
            if len(kinds) == 2:
                return kinds[True], kinds[False]
    return None


def _split_words(name: str) -> list[tuple[str, bool]]:
    """Each word of a name that says what a split is for: the rest of the name, and whether it is for training."""
    name = re.sub(r"(held|hold)[-_ ]out", r"\1out", name, flags=re.IGNORECASE)
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^A-Za-z]+", name)
    kinds = [(i, word.lower() in _TRAIN) for i, word in enumerate(words) if word.lower() in _TRAIN | _HELD_OUT]
    return [
        (re.sub(r"\d+", "", "".join("*" if i == at else word for i, word in enumerate(words))).lower(), is_train)
        for at, is_train in kinds
    ]


def check_one_split(names: Iterable[str], path: Path, *, argument: str) -> None:
    """Refuse images of several splits, which would all be trained on, or compared with, alike.

    Raises:
        ValueError: Naming two folders, and what to give instead.
    """
    found = splits_among(names)
    if found is None:
        return
    train, held_out = found
    remedy = (
        f"Give '{path / train}' alone, and '{path / held_out}' as `held_out`."
        if "/" not in train
        else "Give one of them, or move them so that the splits are the outermost folders."
    )
    raise ValueError(
        f"Argument `{argument}` expected the images of one split, but got '{path}' with '{train}' and '{held_out}', "
        f"which would be taken alike. {remedy}"
    )


def masks_among(images: Sequence[str]) -> tuple[str, str] | None:
    """Find an image that is a mask of another one: ``1_mask.png`` beside ``1.png``, or ``masks/1`` beside ``images/1``.

    Returns:
        The picture and its mask, or None.

    Example:
        >>> masks_among(["a/1.png", "a/1_mask.png"]), masks_among(["images/1.jpg", "masks/1.png"])
        (('a/1.png', 'a/1_mask.png'), ('images/1.jpg', 'masks/1.png'))
        >>> masks_among(["a/1.png", "mask/2.png"]) is None
        True
    """
    stems, pictures = dict[tuple[str, str], str](), dict[tuple[str, str], str]()
    for name in images:
        path = PurePosixPath(name)
        stems.setdefault((str(path.parent), path.stem), name)
        if path.parent.name.lower() in _PICTURES:
            pictures.setdefault((str(path.parent.parent), path.stem), name)
    for name in images:
        path = PurePosixPath(name)
        match = _MASK.fullmatch(path.stem)
        if match is not None and (str(path.parent), match["stem"]) in stems:
            return stems[str(path.parent), match["stem"]], name
        if path.parent.name.lower() in _MASKS and (str(path.parent.parent), path.stem) in pictures:
            return pictures[str(path.parent.parent), path.stem], name
    return None
