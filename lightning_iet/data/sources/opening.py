"""Finds out what a path holds."""

import os
from pathlib import Path

from lightning_iet.data.sources.array import ArraySource, load_array
from lightning_iet.data.sources.base import Source
from lightning_iet.data.sources.folder import FolderSource
from lightning_iet.data.sources.hugging_face import HuggingFaceSource
from lightning_iet.data.sources.tar import TarSource

__all__ = ["open_source"]


def open_source(path: Path, *, argument: str) -> Source:
    """Find out what a path holds, and open it.

    Args:
        path: a folder of images (with folders in it), of WebDataset shards, or of a Hugging Face data set; or a file
            ``.npy``, ``.npz`` or ``.tar``.
        argument: the name under which the user gave the path.

    Returns:
        The source; it holds at least one item.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is something else, empty, damaged, or not readable.
    """
    wanted = f"Argument `{argument}` expected images"
    if not os.path.exists(path):  # which says no, too, to a link that leads to itself
        raise FileNotFoundError(f"{wanted}, but got '{path}', which does not exist. Check its name.")
    try:
        source = _folder(path) if path.is_dir() else _file(path)
    except ModuleNotFoundError:
        raise
    except RecursionError as error:
        raise ValueError(f"{wanted}, but got '{path}', whose folders are nested too deeply.") from error
    except Exception as error:  # readers of archives and tables raise anything on damaged files
        raise ValueError(f"{wanted}, but got '{path}', which cannot be read ({_reason(error)}).") from error
    if not len(source):
        raise ValueError(f"{wanted}, but got '{path}', which holds none. Check the path.")
    return source


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: '{error.filename}'" if error.filename else error.strerror
    return next(iter(str(error).splitlines()), "") or "it is damaged"


def _folder(path: Path) -> Source:
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(child.name for child in path.iterdir() if child.is_dir()))
        raise ValueError(f"it holds several splits; give one of its folders: {splits}")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return HuggingFaceSource(path)
    source = FolderSource(path)
    files = [path / name for name in source.names]
    suffixes = {file.suffix for file in files}
    if suffixes == {".tar"}:
        return TarSource(files)
    return HuggingFaceSource(*files) if suffixes == {".parquet"} else source


def _file(path: Path) -> Source:
    if path.suffix in (".npy", ".npz"):
        return ArraySource(load_array(path))
    if path.suffix == ".tar":
        return TarSource([path])
    if path.suffix == ".parquet":
        return HuggingFaceSource(path)
    raise ValueError("it is no folder, .npy, .npz, .tar or .parquet")
