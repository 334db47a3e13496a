"""Where stored images come from: a folder, an array file, a WebDataset, a Hugging Face data set."""

from lightning_iet.data.sources.array import ArraySource
from lightning_iet.data.sources.base import Data, Source
from lightning_iet.data.sources.folder import FolderSource
from lightning_iet.data.sources.hugging_face import HuggingFaceSource
from lightning_iet.data.sources.opening import open_source
from lightning_iet.data.sources.tar import TarSource

__all__ = ["ArraySource", "Data", "FolderSource", "HuggingFaceSource", "Source", "TarSource", "open_source"]
