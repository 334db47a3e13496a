"""A folder of images with a file of captions."""

import logging
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import Dataset

from lightning_iet.data.captions import CaptionFile, read_captions
from lightning_iet.data.image_folder import ImageFiles
from lightning_iet.data.skips import Skip, listed
from lightning_iet.data.stored import StoredDataModule, StoredSamples

__all__ = ["CaptionFolderDataModule"]

log = logging.getLogger(__name__)

_USUAL = ("metadata.jsonl", "captions.jsonl", "captions.json")


class CaptionFolderDataModule(StoredDataModule):
    """Images with captions: ``metadata.jsonl``, or the JSON of captions that LAION-10k comes with.

    Images without a caption are named and counted like images that cannot be read; captions without an image too, but
    they stop nothing.

    Args:
        root: Folder of the images, and of those below.
        captions: The file of captions, see :func:`~lightning_iet.data.captions.read_captions`; ``None`` =
            ``metadata.jsonl``, ``captions.jsonl`` or ``captions.json`` in the folder.
        held_out: A folder of held-out images with captions; ``None`` = hold out some of those in ``root``.
        held_out_captions: The file of theirs.
        **kwargs: See :class:`~lightning_iet.data.ImageDataModule`.

    Raises:
        FileNotFoundError: In ``setup``, if the folder or the file does not exist.
        ValueError: If some images cannot be used.

    Example:
        >>> laion = CaptionFolderDataModule(Path("laion_10k/train"), image_size=16, synthetic=True)
        >>> laion.setup("fit")
        >>> laion.train_set[0][1]
        'synthetic image ...'
    """

    title: ClassVar[str] = "the folder"
    captioned = True

    def __init__(
        self,
        root: Path | None = None,
        *,
        captions: Path | None = None,
        held_out: Path | None = None,
        held_out_captions: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, held_out=held_out, **kwargs)
        self.captions = {"root": captions, "held_out": held_out_captions}

    def open(self, path: Path, *, argument: str) -> Dataset[Any]:
        """The images of a folder, with their captions."""
        file = CaptionFile(read_captions(self._file(path, argument)))
        source = ImageFiles(path)
        conditions = [file.of(name) for name in source.names]
        if file.unused:  # no error, for one file may hold the captions of several folders
            lost = [Skip(name, "no such image") for name in file.unused]
            log.warning("%d captions belong to no image in '%s': %s.", len(lost), path, listed(lost))
        return StoredSamples(source, conditions, missing="has no caption")

    def _file(self, folder: Path, argument: str) -> Path:
        given = self.captions[argument]
        candidates = [folder / name for name in _USUAL] if given is None else [Path(given)]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            option = "captions" if argument == "root" else "held_out_captions"
            tried = ", ".join(f"'{path}'" for path in candidates)
            raise FileNotFoundError(
                f"Argument `{option}` expected a file of captions, but got {given}, and there is no {tried}. "
                "Give its path."
            )
        return found
