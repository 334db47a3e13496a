"""WebDataset archives: tar files in which members of one name are one sample."""

import json
import tarfile
from pathlib import Path, PurePath
from typing import Any, ClassVar, Literal

from torch.utils.data import Dataset

from lightning_iet.data.folders import StoredDataModule, StoredSamples
from lightning_iet.data.sources import Member, TarSource

Condition = Literal["cls", "txt", "json"]


class WebDatasetDataModule(StoredDataModule):
    """Images in tar files, each with a ``.cls`` (label), ``.txt`` (caption) or ``.json`` of the same name.

    Samples are found by their position in the archives, not read as a stream: so they have an index, and can be split
    into shards and shuffled like any others. Archives are read where they lie, uncompressed.

    Args:
        root: A tar file, or a folder of such.
        held_out: The same, of held-out images; ``None`` = hold out some of those in ``root``.
        condition: Suffix of the members with labels or captions; ``None`` = ``cls``, ``txt`` or ``json``, the first
            that there is.
        json_key: Which entry of a ``.json`` member is the label or caption.
        **kwargs: See :class:`~lightning_iet.data.ImageDataModule`.

    Raises:
        FileNotFoundError: In ``setup``, if a path does not exist.
        ValueError: If there are no tar files, one is damaged or compressed, or some images cannot be used.

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
        condition: Condition | None = None,
        json_key: str = "caption",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, held_out=held_out, **kwargs)
        self.condition = condition
        self.json_key = json_key
        self.captioned = condition in ("txt", "json") and self.num_classes is None

    def open(self, path: Path, *, argument: str) -> Dataset[Any]:
        """Open the samples of one archive, or of all in a folder."""
        paths = [path] if path.is_file() else sorted(path.glob("*.tar"))
        if not paths:
            raise ValueError(f"Argument `{argument}` expected {self.expected}, but got '{path}', which holds none.")
        try:
            source = TarSource(paths)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise ValueError(
                f"Argument `{argument}` expected whole tar files without compression, but got '{path}', of which one "
                f"cannot be read ({error}). Unpack it, or make it again."
            ) from error
        beside: dict[str, dict[tuple[Path, str], Member]] = {}
        for member in source.others:
            beside.setdefault(PurePath(member.name).suffix[1:], {})[_key(member)] = member
        suffix = self.condition or next((suffix for suffix in ("cls", "txt", "json") if suffix in beside), None)
        if suffix is None:
            return StoredSamples(source)
        found = [beside.get(suffix, {}).get(_key(image)) for image in source.members]
        conditions = [None if member is None else self._condition(member) for member in found]
        return StoredSamples(source, conditions, missing=f"has no .{suffix}, or none that can be read")

    def _condition(self, member: Member) -> int | str | None:
        """The label or caption in a member, or ``None`` if it holds neither."""
        try:
            text = member.read().decode().strip()
            if member.name.endswith(".cls"):
                return int(text)
            value = json.loads(text)[self.json_key] if member.name.endswith(".json") else text
        except (ValueError, TypeError, KeyError):
            return None
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, int) or (isinstance(value, str) and value) else None


def _key(member: Member) -> tuple[Path, str]:
    """What the members of one sample have in common: the archive, and the name up to the first dot."""
    name = PurePath(member.name)
    return member.path, str(name.with_name(name.name.partition(".")[0]))
