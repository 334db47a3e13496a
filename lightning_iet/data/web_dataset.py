"""WebDataset archives: tar files in which members of one name are one sample."""

import json
import logging
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import Dataset

from lightning_iet.data.captions import first_caption
from lightning_iet.data.folders import StoredDataModule, stored_pages
from lightning_iet.data.listing import check_one_split
from lightning_iet.data.sources import Member, SeveralImages, TarSource, archives_at, archives_in, shard_names

log = logging.getLogger(__name__)

CONDITIONS = ("cls", "txt", "json")


class WebDatasetDataModule(StoredDataModule):
    """Images in tar files, each with a ``.cls`` (label), ``.txt`` (caption) or ``.json`` of the same name.

    Samples are found by their position in the archives, not read as a stream: so they have an index, and can be split
    into shards and shuffled like any others. Archives are read where they lie; of compressed ones a copy is unpacked
    for the time of the run.

    Args:
        root: A tar file, a folder of such, or a pattern of their names such as ``shards/train-*.tar``.
        held_out: The same, of held-out images; ``None`` = hold out some of those in ``root``.
        condition: What follows the first dot in the names of members with labels or captions, ending in ``cls``,
            ``txt`` or ``json``; ``None`` = ``cls``, ``txt`` or ``json``, the first that there is.
        json_key: Which entry of a ``.json`` member is the label or caption.
        image_key: Which of several images of a sample is trained on, by what follows the first dot: ``jpg``,
            ``output.png``; ``None`` = there is one.
        **kwargs: See :class:`~lightning_iet.data.ImageDataModule`.

    Raises:
        FileNotFoundError: In ``setup``, if a path does not exist.
        ValueError: If there are no tar files, one is damaged, they are of several splits, samples hold several images
            and none is chosen, or some images cannot be used.

    Example:
        >>> archives = WebDatasetDataModule(Path("archives"), condition="txt", image_size=16, synthetic=True)
        >>> archives.setup("fit")
        >>> archives.train_set[0][1]
        'synthetic image ...'
    """

    title: ClassVar[str] = "the archives"
    expected: ClassVar[str] = "a .tar file or a folder of such"

    def __init__(
        self,
        root: Path | None = None,
        *,
        held_out: Path | None = None,
        condition: str | None = None,
        json_key: str = "caption",
        image_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, held_out=held_out, **kwargs)
        kind = None if condition is None else condition.lower().rpartition(".")[2]
        if kind not in (None, *CONDITIONS):
            raise ValueError(
                f"Argument `condition` expected a name that ends in {', '.join(CONDITIONS)}, but got {condition!r}."
            )
        self.condition = None if condition is None else condition.lower().lstrip(".")
        self.json_key = json_key
        self.image_key = image_key
        self.captioned = kind in ("txt", "json") and self.num_classes is None

    def exists(self, path: Path) -> bool:
        """Whether there is something at a path, which may be a pattern."""
        return path.exists() or bool(archives_at(path))

    def files_at(self, path: Path) -> list[Path]:
        """Return the archives at a path: one, those of a folder, or those of a pattern."""
        return archives_in(path) if path.is_dir() else archives_at(path)

    def open(self, path: Path, *, argument: str) -> Dataset[Any]:
        """Open the samples of one archive, or of all in a folder or of a pattern."""
        paths = self.files_at(path)
        if not paths:
            raise ValueError(f"Argument `{argument}` expected {self.expected}, but got '{path}', which holds none.")
        place = path if path.is_dir() else path.parent
        check_one_split(shard_names([shard.name for shard in paths]), place, argument=argument)
        try:
            source = TarSource(paths, image_key=self.image_key, used=[f".{kind}" for kind in CONDITIONS])
        except SeveralImages as error:
            raise ValueError(
                f"Argument `image_key` expected to say which image of each sample in '{path}' is meant, but got "
                f"{self.image_key!r}: {error}."
            ) from error
        except (OSError, ValueError, tarfile.TarError) as error:
            raise ValueError(
                f"Argument `{argument}` expected whole tar files with one image a sample, but got '{path}', of which "
                f"one cannot be read ({error}). Mend or choose as it says."
            ) from error
        check_one_split([member.name for member in source.members], path, argument=argument)
        beside: dict[str, dict[tuple[Path, str], Member]] = {}
        for member in source.others:
            other = beside.setdefault(member.ending, {}).setdefault(member.key, member)
            if other is not member and member.ending.rpartition(".")[2] in CONDITIONS:
                raise ValueError(
                    f"Argument `{argument}` expected one member of a name, but got '{member.name}' of '{member.path}' "
                    "twice. Remove one."
                )
        if source.left_alone:
            log.warning("In '%s' these are left alone: %s; %d images are read.", path, source.left_alone, len(source))
        ending = self.condition or self._found(beside)
        if ending is None:
            return stored_pages(source)
        found = [beside.get(ending, {}).get(image.key) for image in source.members]
        conditions = [None if member is None else self._condition(member) for member in found]
        return stored_pages(source, conditions, missing=f"has no .{ending}, or none that can be read")

    def _found(self, beside: Mapping[str, Any]) -> str | None:
        """The members with labels or captions: of the plain name, or else the only ones that end so."""
        for kind in CONDITIONS:
            fitting = [kind] if kind in beside else [ending for ending in beside if ending.endswith(f".{kind}")]
            if len(fitting) > 1:
                raise ValueError(
                    f"Argument `condition` expected one of {', '.join(sorted(fitting))}, since there are several, but "
                    "got None."
                )
            if fitting:
                return fitting[0]
        return None

    def _condition(self, member: Member) -> int | str | None:
        """The label or caption in a member, or ``None`` if it holds neither."""
        try:
            text = member.read().decode().strip()
            if member.ending.rpartition(".")[2] == "cls":
                return int(text)
            value = json.loads(text)[self.json_key] if member.ending.rpartition(".")[2] == "json" else text
        except (ValueError, TypeError, KeyError):
            return None
        if isinstance(value, int):
            return value
        try:
            return first_caption(value) or None
        except TypeError:
            return None
