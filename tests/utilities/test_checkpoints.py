import pytest
import torch

from lightning_iet.utilities.checkpoints import check_whole


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
