import gzip

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.data.fashion_mnist import find_idx, read_idx
from tests.helpers.fashion import idx


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_what_is_written_is_read(tmp_path_factory, shape):
    tensor = torch.randint(256, shape, dtype=torch.uint8)
    folder = tmp_path_factory.mktemp("idx")
    (folder / "plain").write_bytes(idx(tensor))
    (folder / "packed.gz").write_bytes(gzip.compress(idx(tensor), mtime=0))
    assert torch.equal(read_idx(find_idx(folder, "plain")), tensor)
    assert torch.equal(read_idx(find_idx(folder, "packed")), tensor)
    assert find_idx(folder, "other") is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", b"", "its header does not fit its content"),
        ("a", b"\0\0\x0d\x01\0\0\0\x01" + bytes(4), "its values are torch.float32"),
        ("a", idx(torch.zeros(2, 3, 3))[:-1], "its header does not fit its content"),
        ("a", b"\0\0\x08\x03\0\0", "its header does not fit its content"),
        ("a.gz", b"no gzip", "Not a gzipped file"),
        ("a.gz", gzip.compress(idx(torch.zeros(9)), mtime=0)[:-9], "end-of-stream"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^Argument `root` expected idx files, but got '.*{name}', .*{message}"):
        read_idx(tmp_path / name)
