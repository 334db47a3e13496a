import pickle

import pytest
import torch
from torchvision.datasets import cifar as torchvision_cifar

from lightning_iet.data import CIFAR10DataModule, CIFAR100DataModule
from tests.helpers.pictures import pixels

FILES = {
    CIFAR10DataModule: ("cifar-10-batches-py", [f"data_batch_{n}" for n in range(1, 6)], "test_batch", "batches.meta"),
    CIFAR100DataModule: ("cifar-100-python", ["train"], "test", "meta"),
}
BOTH = pytest.mark.parametrize("kind", FILES)


def write_cifar(root, kind, each=40):
    """Files as their authors pickled them, with random pixels; returns training images and labels."""
    folder, train, test, meta = FILES[kind]
    (root / folder).mkdir(parents=True)
    ten = kind is CIFAR10DataModule
    written = []
    for seed, name in enumerate([*train, test]):
        images = pixels(each, size=(3, 32), channels=32, seed=seed)  # planes: red, green, blue
        labels = [number % kind.classes for number in range(each)]
        batch = {"data": images.reshape(each, 3072), "labels" if ten else "fine_labels": labels}
        (root / folder / name).write_bytes(pickle.dumps(batch))
        written.append((torch.from_numpy(images.reshape(each, 3, 32, 32)), labels))
    names = {"label_names" if ten else "fine_label_names": [str(number) for number in range(kind.classes)]}
    (root / folder / meta).write_bytes(pickle.dumps(names))
    return torch.cat([images for images, _ in written[:-1]]), [label for _, labels in written[:-1] for label in labels]


@pytest.fixture
def any_checksum(monkeypatch):
    """Files of a few random images do not have the checksums of the real ones."""
    import os

    monkeypatch.setattr(torchvision_cifar, "check_integrity", lambda path, md5=None: os.path.isfile(path))


@BOTH
def test_the_files_are_read(tmp_path, kind, any_checksum):
    images, labels = write_cifar(tmp_path, kind)
    data = kind(tmp_path, num_control=10, flip=True, num_workers=1)
    data.setup("fit")
    assert len(data.train_set) == len(images)
    assert [len(data.control_set), len(data.reference_set)] == [10, 30]
    for number in (0, 7, len(images) - 1):
        image, label, index = data.train_set[number]
        assert torch.equal(image, images[number] / 255)
        assert (label, index) == (labels[number], number)
    assert data.num_classes == kind.classes
    batch, conditions, _ = next(iter(data.train_dataloader()))
    assert batch.shape[1:] == (3, 32, 32)
    assert conditions.dtype == torch.int64


@BOTH
def test_a_subset_in_grey_and_small(tmp_path, kind, any_checksum):
    write_cifar(tmp_path, kind)
    data = kind(tmp_path, num_control=10, subset=20, channels=1, image_size=16)
    data.setup("fit")
    assert len(data.train_set) == 20
    assert data.train_set[0][0].shape == (1, 16, 16)
    if kind is CIFAR10DataModule:
        assert data.train_set.targets.bincount().tolist() == [2] * 10


@BOTH
def test_nothing_there(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=rf"the folder {FILES[kind][0]}\), but got .*`download: true`"):
        kind(tmp_path).setup("fit")


@BOTH
def test_damaged_files_are_refused(tmp_path, kind):
    write_cifar(tmp_path, kind, each=2)
    with pytest.raises(ValueError, match=rf"the files of {kind.title}, but some in '.*' are missing or damaged"):
        kind(tmp_path).setup("fit")


@BOTH
def test_without_a_network_a_download_is_one_line(tmp_path, kind, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision_cifar, "download_and_extract_archive", offline)
    kind(tmp_path).prepare_data()
    with pytest.raises(ConnectionError, match=rf"^{kind.title} could not be fetched \(no route to host\)\. Without"):
        kind(tmp_path, download=True).prepare_data()


@BOTH
def test_the_synthetic_twin(kind):
    data = kind(synthetic=True)
    data.setup("fit")
    assert data.train_set[0][0].shape == (3, 32, 32)
    assert data.train_set.targets.unique().tolist() == list(range(kind.classes))
