import gzip

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.data import FashionMNISTDataModule, known_sets
from lightning_iet.data.known_sets import find_idx, read_idx
from tests.helpers.fashion import NAMES, idx, write_fashion


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", ["", "FashionMNIST/raw"])
def test_both_layouts_are_read(tmp_path, packed, layout):
    images, labels, test_images, _ = write_fashion(tmp_path / layout, packed=packed)
    data = FashionMNISTDataModule(tmp_path, num_control=10)
    data.setup("fit")
    assert [len(samples) for samples in (data.train_set, data.control_set, data.reference_set)] == [60, 10, 30]
    assert data.train_set.targets.tolist() == labels.tolist()
    for number, (image, label, index) in enumerate(data.train_set):
        assert image.shape == (1, 32, 32)
        assert torch.equal(image[0, 2:30, 2:30], images[number] / 255)
        assert image.sum() == pytest.approx(float((images[number] / 255).sum()), rel=1e-5)  # a black frame
        assert (label, index) == (int(labels[number]), number)
    held_out = {tuple(image[0, 2:30, 2:30].flatten().tolist()) for image, _, _ in data.control_set}
    assert held_out <= {tuple((image / 255).flatten().tolist()) for image in test_images}


def test_other_sizes_and_channels(tmp_path):
    write_fashion(tmp_path)
    for size, channels, shape in ((None, 1, (1, 28, 28)), (64, 3, (3, 64, 64)), ((16, 24), 1, (1, 16, 24))):
        data = FashionMNISTDataModule(tmp_path, num_control=10, image_size=size, channels=channels)
        data.setup("fit")
        assert data.train_set[0][0].shape == shape
        synthetic = FashionMNISTDataModule(image_size=size, channels=channels, synthetic=True)
        synthetic.setup("fit")
        assert synthetic.train_set[0][0].shape == shape


def test_where_the_files_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(known_sets, "DEBIAN", tmp_path / "debian")
    with pytest.raises(FileNotFoundError, match=r"but got 'data', which has none\. .*`download: true`.*`synthetic"):
        FashionMNISTDataModule().setup("fit")
    write_fashion(tmp_path / "debian", train=50, packed=True)
    write_fashion(tmp_path / "data" / "FashionMNIST" / "raw", train=70)
    sizes = []
    for _ in range(2):
        data = FashionMNISTDataModule(num_control=10)
        data.setup("fit")
        sizes.append(len(data.train_set))
        for path in (tmp_path / "data").rglob("*ubyte"):
            path.unlink()
    assert sizes == [70, 50]
    with pytest.raises(FileNotFoundError, match="but got 'elsewhere', which has none"):
        FashionMNISTDataModule("elsewhere").setup("fit")


def test_labels_and_images_must_match(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / NAMES[1]).write_bytes(idx(torch.full((60,), 11)))
    with pytest.raises(ValueError, match=r"labels 0 … 9, but got 11"):
        FashionMNISTDataModule(tmp_path, num_control=10).setup("fit")
    (tmp_path / NAMES[1]).write_bytes(idx(torch.zeros(59)))
    with pytest.raises(ValueError, match="and 59 labels"):
        FashionMNISTDataModule(tmp_path, num_control=10).setup("fit")


def test_a_download_is_made_only_when_asked_for_and_needed(tmp_path, monkeypatch):
    calls = []

    def fetch(root, *, download):
        calls.append((root, download))
        raise RuntimeError("Error downloading\ntrain-images")

    monkeypatch.setattr(known_sets, "FashionMNIST", fetch)
    FashionMNISTDataModule(tmp_path).prepare_data()
    FashionMNISTDataModule(tmp_path, download=True, synthetic=True).prepare_data()
    assert not calls
    with pytest.raises(ConnectionError, match=r"Fashion-MNIST could not be fetched \(Error downloading train-images\)"):
        FashionMNISTDataModule(tmp_path, download=True).prepare_data()
    write_fashion(tmp_path)
    FashionMNISTDataModule(tmp_path, download=True).prepare_data()
    assert calls == [(tmp_path, True)]


@pytest.mark.skipif(not known_sets.DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = FashionMNISTDataModule(subset=1000)
    data.setup("fit")
    assert [len(samples) for samples in (data.train_set, data.control_set, data.reference_set)] == [1000, 512, 9488]
    assert data.train_set.targets.bincount().tolist() == [100] * 10


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
