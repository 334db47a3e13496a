"""Tables of Hugging Face data sets: which files are which split, and their columns of images."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_iet.data.listing import is_system
from lightning_iet.utilities.errors import require

_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")


def splits_at(path: Path, configuration: str | None = None) -> dict[str, list[Path]]:
    """Return the splits at a path, each with what :func:`load_table` reads.

    Parquet files belong to the split that their name begins with, up to a hyphen, or that their folder is called;
    where none of them names a usual split, or all name the same, all are ``train``. Files of one split in several
    folders (``en/train-…``, ``de/train-…``), or with a word before the split (``en-train-…``), are different data sets,
    unless they count themselves as one (``…-00000-of-00002`` in one, ``…-00001-of-00002`` in the other).

    Args:
        path: A folder of ``save_to_disk``, a folder of Parquet files, or one such file.
        configuration: Which of several data sets: the name of its folder, or the word before the split.

    Raises:
        ValueError: If there are several, or none of that name, naming those that there are.
    """
    if (path / "dataset_dict.json").is_file():
        return {folder.name: [folder] for folder in sorted(path.iterdir()) if folder.is_dir()}
    if (path / "dataset_info.json").is_file() and not any(path.rglob("*.parquet")):
        return {"train": [path]}
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    files = [file for file in files if file == path or not is_system(file.relative_to(path).as_posix())]
    found: dict[str, dict[str, list[Path]]] = {}
    for file in files:
        name, split = _belongs_to(file, path)
        found.setdefault(name, {}).setdefault(split, []).append(file)
    chosen = _choose(found, configuration)
    if "train" in chosen or not chosen:
        return chosen
    if "training" in chosen:
        return {"train": chosen["training"]} | chosen
    usual = [split for split in chosen if split.lower() in _SPLITS]
    files = [file for part in chosen.values() for file in part]
    return chosen if usual and len(chosen) > 1 else {"train": files} | chosen


def _belongs_to(file: Path, path: Path) -> tuple[str, str]:
    """The configuration and the split of a Parquet file."""
    folder = PurePosixPath() if file == path else PurePosixPath(file.relative_to(path).parent.as_posix())
    first, *rest = file.stem.split("-")
    counted = re.fullmatch(r"([A-Za-z]+)[_.]?\d*", first)  # train, train_00
    if counted is not None and counted[1].lower() in _SPLITS:
        return str(folder), counted[1]
    at = next((number for number, word in enumerate(rest) if word.lower() in _SPLITS), None)
    if at is not None:
        return str(folder / "-".join([first, *rest[:at]])), rest[at]
    if file.stem.isdigit() or folder.name.lower() in _SPLITS:
        return str(folder.parent), file.parent.name
    return str(folder), first


def _choose(found: dict[str, dict[str, list[Path]]], configuration: str | None) -> dict[str, list[Path]]:
    """The splits of one configuration."""
    if configuration is not None:
        fitting = [name for name in found if configuration in (name, PurePosixPath(name).name)]
        if len(fitting) != 1:
            raise ValueError(f"there are {', '.join(sorted(found)) or 'none'}")
        return found[fitting[0]]
    merged: dict[str, list[Path]] = {}
    for splits in found.values():
        for split, files in splits.items():
            merged.setdefault(split, []).extend(files)
    if len(found) > 1 and not all(_is_one_set(files) for files in merged.values()):
        raise ValueError(f"there are several, {', '.join(sorted(found))}: give one of them")
    return merged


def _is_one_set(files: Sequence[Path]) -> bool:
    """Whether files count themselves as parts of one: each of 0 … N - 1 once."""
    matches = [re.search(r"-(\d+)-of-(\d+)$", file.stem) for file in files]
    numbers = [(int(match[1]), int(match[2])) for match in matches if match is not None]
    return len(numbers) == len(files) and sorted(numbers) == [(number, len(files)) for number in range(len(files))]


def one_split(path: Path, name: str | None) -> list[Path]:
    """Return what :func:`load_table` reads of one split.

    Args:
        path: See :func:`splits_at`.
        name: Of the split, or of the configuration; ``None`` = the only one.

    Raises:
        ValueError: If there are several, naming them.
    """
    try:
        splits = splits_at(path)
    except ValueError as error:
        if name is None:
            raise ValueError(f"of its data sets {error}, as '{path.name}:NAME' or by the path of its folder") from error
        splits, name = splits_at(path, name), None
    every = {file for files in splits.values() for file in files}
    whole = next((files for files in splits.values() if set(files) == every), None)
    if name is None and whole is not None:
        return whole
    if name not in splits:
        example = next(iter(splits), "train")
        raise ValueError(
            f"it holds several splits; give one of its folders: {', '.join(splits)}, or '{path.name}:{example}'"
        )
    return splits[name]


def load_table(*paths: Path) -> Any:
    """Load one split as a ``datasets.Dataset``.

    Args:
        paths: A folder as ``save_to_disk`` writes it, or Parquet files.

    Returns:
        The split.

    Raises:
        ModuleNotFoundError: Without the package ``datasets``.
    """
    datasets = require("datasets", "audit")
    if paths[0].is_dir():
        return datasets.load_from_disk(str(paths[0]))
    return datasets.Dataset.from_parquet([str(path) for path in paths], keep_in_memory=True)


class HuggingFaceSource:
    """One column of images of a split.

    Args:
        paths: As :func:`load_table`.
        table: A split that is loaded already, instead of paths.
        column: Its name; ``None`` = the only column of images.

    Raises:
        ModuleNotFoundError: Without the package ``datasets``.
        ValueError: If there is no such column, or not one column of images.
    """

    def __init__(self, *paths: Path, table: Any = None, column: str | None = None) -> None:
        datasets = require("datasets", "audit")
        table = load_table(*paths) if table is None else table
        columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
        if column is not None and column not in columns:
            raise ValueError(f"its columns of images are {columns}, and '{column}' is none of them")
        if column is None and len(columns) != 1:
            which = f" ({', '.join(columns)})" if columns else ""
            raise ValueError(f"it has {len(columns)} columns of images{which}, not one")
        self.column = column or columns[0]
        self.data = table.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        """Return the row of the data set."""
        return str(index)

    def read(self, index: int) -> bytes:
        """Return the bytes of an image, which lie in the row itself or in a file of its own."""
        image = self.data[index][self.column]
        if image is None:
            raise ValueError("a row without an image")
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
