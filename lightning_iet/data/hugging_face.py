"""Data sets of Hugging Face: from the hub, from ``save_to_disk``, or in Parquet files."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import Dataset

from lightning_iet.data.captions import TEXT_KEYS, first_caption
from lightning_iet.data.folders import StoredSamples, stored_pages
from lightning_iet.data.images import ImageDataModule, one_line_download
from lightning_iet.data.samples import reason_of
from lightning_iet.data.sources import HuggingFaceSource, load_table, splits_at
from lightning_iet.utilities.errors import require

log = logging.getLogger(__name__)

_LABELS = ("label", "labels", "fine_label")


class HuggingFaceDataModule(ImageDataModule):
    """Images of a Hugging Face data set, with the labels or captions of another column.

    Labels are integers, or in a column of labels words, which are numbered in order of name. Of several captions in a
    row the first is taken.

    Args:
        root: A folder as ``save_to_disk`` writes it, a folder of Parquet files, or one such file; or a hub id
            (``user/name``), with ``download=True``.
        split: Name of the split to train on, where there are several.
        held_out_split: Name of the split that is held out; ``None`` = hold out some of the training images.
        configuration: Which of several data sets that lie in one place, such as ``en`` beside ``de``.
        image_column: Of the images; ``None`` = the only one.
        condition_column: Of labels (integers) or captions (texts); ``None`` = the first that is there of ``label``,
            ``labels``, ``fine_label``, ``text``, ``caption``, ``captions`` and ``prompt``.
        **kwargs: See :class:`~lightning_iet.data.ImageDataModule`.

    Attributes:
        classes: Words of the labels, by number; empty where labels are numbers.

    Raises:
        ModuleNotFoundError: In ``setup``, without the package ``datasets``, which the extra ``audit`` brings.
        FileNotFoundError: If there is nothing at ``root``.
        ConnectionError: If the hub cannot be reached.
        ValueError: If a column or split is missing, or some images cannot be used.

    Example:
        >>> faces = HuggingFaceDataModule(Path("user/faces"), condition_column="text", image_size=16, synthetic=True)
        >>> faces.setup("fit")
        >>> faces.train_set[0][0].shape, faces.train_set[0][1]
        (torch.Size([3, 16, 16]), 'synthetic image ...')
    """

    title: ClassVar[str] = "the data set"
    downloadable: ClassVar[bool] = True

    def __init__(
        self,
        root: Path | None = None,
        *,
        split: str = "train",
        held_out_split: str | None = None,
        configuration: str | None = None,
        image_column: str | None = None,
        condition_column: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        self.split = split
        self.held_out_split = held_out_split
        self.configuration = configuration
        self.classes: list[str] = []
        self.image_column = image_column
        self.condition_column = condition_column
        self.captioned = condition_column in TEXT_KEYS

    def fetch(self) -> None:
        """Download what is no local path into the cache of the hub's client."""
        if not self._path.exists():
            self._from_hub(self.split)

    def load(self) -> Dataset[Any] | tuple[Dataset[Any], Dataset[Any]]:
        """Open the split to train on, and the one that is held out."""
        if self.held_out_split == self.split:
            raise ValueError(
                f"Argument `held_out_split` expected another split than {self.split!r}, which is trained on, but got "
                "the same. Leave it out to hold some of those images out."
            )
        if self._path.exists() and self.held_out_split is not None:
            found = self._splits()
            held_out = found.get(str(self.held_out_split), [])
            if not held_out or set(held_out) & set(found.get(self.split, [])):  # one file holds several splits
                raise ValueError(
                    f"Argument `held_out_split` expected files of their own beside those of {self.split!r}, but got "
                    f"{self.held_out_split!r} at '{self._path}', where splits {', '.join(sorted(found))} were found. "
                    "Name Parquet files after their split: train-….parquet, test-….parquet."
                )
        train = self._open(self.split)
        return train if self.held_out_split is None else (train, self._open(self.held_out_split))

    @property
    def _path(self) -> Path:
        if self.root is None:
            raise ValueError("Argument `root` expected a path or a hub id, but got None. Give the data's place.")
        return self.root

    def _open(self, split: str) -> StoredSamples:
        table = self._from_files(split) if self._path.exists() else self._from_hub(split)
        try:
            source = HuggingFaceSource(table=table, column=self.image_column)
        except ValueError as error:
            raise ValueError(
                f"Argument `image_column` expected a column of images of '{self.root}', but got {self.image_column!r}: "
                f"{error}. Name one."
            ) from error
        columns, column = table.column_names, self.condition_column
        if column is None:
            column = next((name for name in (*_LABELS, *TEXT_KEYS) if name in columns), None)
        elif column not in columns:
            raise ValueError(
                f"Argument `condition_column` expected one of {', '.join(map(repr, columns))}, but got {column!r}."
            )
        used = [source.column] + ([] if column is None else [column])
        if set(columns) - set(used):
            beside = ", ".join(repr(name) for name in columns if name not in used)
            log.warning(
                "Of '%s' columns %s are used; left alone: %s.", self.root, " and ".join(map(repr, used)), beside
            )
        return stored_pages(
            source, None if column is None else self._conditions(list(table[column]), column), missing=f"no {column}"
        )

    def _conditions(self, values: Sequence[Any], column: str) -> list[Any]:
        """Labels as numbers, and of several captions the first."""
        kinds = {type(value) for value in values if value is not None}
        if column in _LABELS and kinds == {str}:
            self.classes = self.classes or sorted({value for value in values if value is not None})
            unknown = {value for value in values if value is not None} - set(self.classes)
            if unknown:
                raise ValueError(
                    f"Argument `held_out_split` expected the labels of the training images, but got {min(unknown)!r}."
                )
            return [None if value is None else self.classes.index(value) for value in values]
        if not kinds - {int, str}:
            return [value if value != "" else None for value in values]
        try:
            return [first_caption(value) or None for value in values]
        except TypeError as error:
            raise ValueError(
                f"Argument `condition_column` expected integers, texts, or lists of texts in {column!r}, but got "
                f"others ({error}). Give another column."
            ) from error

    def _splits(self) -> dict[str, list[Path]]:
        try:
            return splits_at(self._path, self.configuration)
        except ValueError as error:
            raise ValueError(
                f"Argument `configuration` expected one of those at '{self.root}', but got {self.configuration!r}: "
                f"{error}."
            ) from error

    def _from_files(self, split: str) -> Any:
        found = self._splits()
        if split not in found:
            raise ValueError(
                f"Argument `split` expected one of {', '.join(map(repr, found)) or 'none'} at '{self.root}', but got "
                f"{split!r}. Give that of the data."
            )
        try:
            return load_table(*found[split])
        except (ModuleNotFoundError, FileNotFoundError):
            raise
        except Exception as error:  # the package raises errors of its own, some not of Python's kinds
            raise ValueError(
                f"Argument `root` expected whole files of a data set, but got '{self.root}', which cannot be read "
                f"({reason_of(error)})."
            ) from error

    def _from_hub(self, split: str) -> Any:
        if not self.download:
            raise FileNotFoundError(
                f"Argument `root` expected a folder of save_to_disk or Parquet files, but got '{self.root}', which "
                "does not exist. If it is a hub id, fetch it by `download: true`; without a network, give the path of "
                "a local copy, or try with random images by `synthetic: true`."
            )
        with one_line_download(f"'{self.root}'", None):
            which = {} if self.configuration is None else {"name": self.configuration}
            return require("datasets", "audit").load_dataset(str(self.root), split=split, **which)
