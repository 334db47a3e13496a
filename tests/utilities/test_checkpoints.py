import enum
import errno
import os
import signal
import socket
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import fsspec
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from lightning_iet.utilities import checkpoints
from lightning_iet.utilities.checkpoints import AtomicCheckpointIO, check_whole, use_atomic_checkpoints
from tests.helpers.models import quiet_trainer

CHECKPOINT = {"weights": torch.arange(1000.0), "step": 3}


def save(checkpoint, path):
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)


def test_what_is_saved_is_what_is_loaded_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a" / "b" / "last.ckpt"
    for step in (1, 2):
        save(CHECKPOINT | {"step": step}, path)
        loaded = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
        assert loaded["step"] == step
        assert torch.equal(loaded["weights"], CHECKPOINT["weights"])
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    AtomicCheckpointIO().remove_checkpoint(path)
    assert not path.exists()


class Mode(enum.Enum):
    SLOW = 1


class Own(torch.Tensor):
    """A tensor that is read by running code of its own."""


def around_itself():
    content = {"weights": torch.ones(3)}
    content |= {"content": [content, content], "same": content, "list": [1]}
    content["list"].append(content["list"])
    return content


MODEL = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
CONTENTS = {
    "weights": (MODEL.state_dict(), True, True),
    "parameters": (list(MODEL.parameters()), True, True),
    "optimizer": (torch.optim.Adam(MODEL.parameters()).state_dict(), True, True),
    "several times": (around_itself(), True, True),
    "nested": ({"a": (torch.ones(2), [OrderedDict(b=(1, torch.ones(2)))]), 3: {"c": None}}, True, True),
    "paths": ({"folder": Path("a/b")}, True, True),
    "an array": ({"indices": np.arange(3)}, True, True),
    # Known from the file alone: what the process allows anew, and what may be large, which is not copied in memory.
    "a large array": ({"indices": np.arange(2**18)}, False, True),
    "an enumeration": ({"mode": Mode.SLOW}, False, True),
    "tensors in an object": (SimpleNamespace(weight=torch.ones(2)), False, True),
    "tensors of another kind": ({"weights": torch.ones(3).as_subclass(Own)}, False, False),
    "a module": ({"loss": [torch.nn.MSELoss()]}, False, False),
    "a function": ((torch.ones(2), {"reduce": os.mkdir}), False, False),
}


@pytest.fixture
def _allowed_once():
    """What the test allows to be read is not allowed to the next one."""
    before = torch.serialization.get_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.mark.usefixtures("_allowed_once")
@pytest.mark.filterwarnings("always:The checkpoint .* was written, but no run can go on from it:UserWarning")
@pytest.mark.parametrize("name", CONTENTS)
def test_what_cannot_be_read_without_running_code_is_warned_of_once(tmp_path, name, monkeypatch, recwarn):
    content, is_known_at_once, is_read = CONTENTS[name]
    asked = []
    unreadable = checkpoints._unreadable
    monkeypatch.setattr(checkpoints, "_unreadable", lambda path: asked.append(path) or unreadable(path))
    io = AtomicCheckpointIO()
    for file in (tmp_path / "first.ckpt", tmp_path / "second.ckpt"):
        io.save_checkpoint({"content": content, "step": 3}, file)
    assert len(recwarn) == (0 if is_read else 1)
    assert asked == ([] if is_known_at_once else [tmp_path / "first.ckpt"])
    try:
        torch.load(tmp_path / "first.ckpt", weights_only=True)
    except Exception:
        assert not is_read
    else:
        assert is_read


def test_files_have_the_permissions_of_any_other_file(tmp_path):
    save(CHECKPOINT, tmp_path / "last.ckpt")
    (tmp_path / "any").touch()
    assert (tmp_path / "last.ckpt").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_the_bytes_are_on_the_disk_before_the_name_is_given_and_the_name_before_it_returns(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def traced(*args, name=name, original=original):
            what = Path(os.readlink(f"/proc/self/fd/{args[0]}")).suffix if name == "fsync" else ""
            events.append(name + what)
            return original(*args)

        monkeypatch.setattr(os, name, traced)
    save(CHECKPOINT, tmp_path / "last.ckpt")
    assert events == ["fsync.unfinished", "replace", "fsync"]


class Full:
    """Lets a file system be full after some bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("room", [0, 500, 4000])
def test_a_full_disk_is_one_clear_error_and_the_old_file_stays(tmp_path, monkeypatch, room):
    path = tmp_path / "last.ckpt"
    save(CHECKPOINT, path)
    before = path.read_bytes()
    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *args: Full(opened(self, *args), room))
        with pytest.raises(OSError, match=r"last\.ckpt' could not be written \(No space left on device, \d+ MiB free"):
            save(CHECKPOINT | {"step": 4}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_found_out_at_fsync_is_the_same_error(tmp_path, monkeypatch):
    """Network file systems say so only then."""

    def full(descriptor):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not be written \(.*quota.*MiB free\)"):
        save(CHECKPOINT, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_the_same_error():
    with pytest.raises(OSError, match=r"could not be written \(Not a directory\)"):
        save(CHECKPOINT, "/dev/null/checkpoints/last.ckpt")


def test_what_cannot_be_pickled_is_the_callers_error_and_leaves_nothing(tmp_path):
    with pytest.raises((AttributeError, TypeError)):
        save({"code": lambda: None}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_what_dead_processes_have_left_unfinished_is_cleared_away(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    name = "last.ckpt"
    gone = f".{name}.{socket.gethostname()}.{dead.pid}.unfinished"
    kept = [f".{name}.{socket.gethostname()}.{os.getppid()}.unfinished", f".{name}.elsewhere.{dead.pid}.unfinished"]
    for file in (gone, *kept):
        (tmp_path / file).touch()
    save(CHECKPOINT, tmp_path / name)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([name, *kept])


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.ckpt"
    save(CHECKPOINT, path)
    child = os.fork()
    if child == 0:
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        save(CHECKPOINT | {"step": 4}, path)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert torch.load(path, weights_only=True)["step"] == 3
    assert len(list(tmp_path.iterdir())) == 2
    save(CHECKPOINT | {"step": 5}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_remote_places_are_written_in_lightnings_way():
    save(CHECKPOINT, "memory://checkpoints/last.ckpt")
    assert AtomicCheckpointIO().load_checkpoint("memory://checkpoints/last.ckpt", weights_only=True)["step"] == 3
    assert fsspec.filesystem("memory").ls("/checkpoints", detail=False) == ["/checkpoints/last.ckpt"]


def test_storage_options_are_refused_as_by_lightning(tmp_path):
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "last.ckpt", storage_options={})


def test_it_takes_the_place_of_lightnings_and_of_no_other(tmp_path):
    class Own(TorchCheckpointIO):
        pass

    own = Own()
    trainer = quiet_trainer(tmp_path, plugins=[own])
    use_atomic_checkpoints(trainer)
    assert trainer.strategy.checkpoint_io is own
    trainer = quiet_trainer(tmp_path)
    use_atomic_checkpoints(trainer)
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    use_atomic_checkpoints(trainer)
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO


def test_a_torn_file_is_called_torn(tmp_path):
    save(CHECKPOINT, tmp_path / "last.ckpt")
    content = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"expected a whole checkpoint, but got .* which is cut off"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "whole.ckpt"
    torch.save({"weights": torch.arange(1000.0)}, path)
    return path


def test_a_whole_file_passes(checkpoint):
    check_whole(checkpoint, argument="ckpt")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_torn_file_is_named(checkpoint, share):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"`ckpt` expected a whole checkpoint.*whole\.ckpt', which is cut off"):
        check_whole(checkpoint, argument="ckpt")


def test_a_damaged_file_is_named(checkpoint):
    content = bytearray(checkpoint.read_bytes())
    at = content.index(torch.arange(1000.0).numpy().tobytes()[100:200])
    content[at] ^= 1
    checkpoint.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"whole\.ckpt', of which '.*' is damaged"):
        check_whole(checkpoint, argument="ckpt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt', which does not exist"):
        check_whole(tmp_path / "nowhere.ckpt", argument="ckpt")
