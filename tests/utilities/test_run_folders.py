import os
from pathlib import Path

import pytest

from lightning_iet.utilities.files import checkpoint_of


def touch(path, time):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    os.utime(path, (time, time))
    return path


def test_the_newest_version_that_has_a_checkpoint_counts(tmp_path):
    touch(tmp_path / "version_9/checkpoints/last.ckpt", 9)
    newest = touch(tmp_path / "version_10/checkpoints/last.ckpt", 3)
    touch(tmp_path / "version_10/checkpoints/epoch=4.ckpt", 4)
    (tmp_path / "version_11/checkpoints").mkdir(parents=True)
    assert checkpoint_of(tmp_path) == newest
    assert checkpoint_of(tmp_path / "version_9") == tmp_path / "version_9/checkpoints/last.ckpt"
    assert checkpoint_of(tmp_path / "version_9/checkpoints") == tmp_path / "version_9/checkpoints/last.ckpt"


def test_without_last_the_newest_file_counts(tmp_path):
    touch(tmp_path / "checkpoints/b.ckpt", 1)
    newest = touch(tmp_path / "checkpoints/a.ckpt", 2)
    assert checkpoint_of(tmp_path) == newest


def test_a_file_is_itself_and_a_folder_without_checkpoints_is_refused(tmp_path):
    assert checkpoint_of(Path("any.ckpt")) == Path("any.ckpt")
    with pytest.raises(FileNotFoundError, match="Argument `ckpt_path` expected a checkpoint or the folder of a run"):
        checkpoint_of(tmp_path, argument="ckpt_path")
