"""Where images come from: the sources that data modules read, too."""

from lightning_iet.data.sources import (
    ArraySource,
    FolderSource,
    HuggingFaceSource,
    Source,
    TarSource,
    open_source,
)

__all__ = ["ArraySource", "FolderSource", "HuggingFaceSource", "Source", "TarSource", "open_source"]
