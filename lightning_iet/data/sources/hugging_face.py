"""Images that are rows of a Hugging Face data set."""

from pathlib import Path
from typing import Any

from lightning_iet.utilities.imports import require

__all__ = ["HuggingFaceSource", "load_table"]


def load_table(*paths: Path) -> Any:
    """Load one split as a ``datasets.Dataset``.

    Args:
        paths: a folder as ``save_to_disk`` writes it, or Parquet files.

    Returns:
        The split.

    Raises:
        ModuleNotFoundError: without the package ``datasets``.
    """
    datasets = require("datasets", "audit")
    if paths[0].is_dir():
        return datasets.load_from_disk(str(paths[0]))
    return datasets.Dataset.from_parquet([str(path) for path in paths], keep_in_memory=True)


class HuggingFaceSource:
    """One column of images of a split.

    Args:
        paths: as :func:`load_table`.
        table: a split that is loaded already, instead of paths.
        column: its name; ``None`` = the only column of images.

    Raises:
        ModuleNotFoundError: without the package ``datasets``.
        ValueError: if there is no such column, or not one column of images.
    """

    def __init__(self, *paths: Path, table: Any = None, column: str | None = None) -> None:
        datasets = require("datasets", "audit")
        table = load_table(*paths) if table is None else table
        columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
        if column is not None and column not in columns:
            raise ValueError(f"its columns of images are {columns}, and '{column}' is none of them")
        if column is None and len(columns) != 1:
            raise ValueError(f"it has {len(columns)} columns of images, not one")
        self.column = column or columns[0]
        self.data = table.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        """Row of the data set."""
        return str(index)

    def read(self, index: int) -> bytes:
        """Bytes of an image, which lie in the row itself or in a file of its own."""
        image = self.data[index][self.column]
        if image is None:
            raise ValueError("a row without an image")
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
