import numpy as np
import pytest

from lightning_iet import ShardedDataModule
from lightning_iet.data import ImageFolderDataModule
from tests.helpers.pictures import to_bytes, write_pictures

CLASSES = [f"{name}/{number}.png" for name in ("cat", "dog", "emu") for number in range(6)]


def set_up(*args, **kwargs):
    data = ImageFolderDataModule(*args, **{"num_control": 3, "batch_size": 4} | kwargs)
    data.setup("fit")
    return data


def test_folders_are_classes_and_files_in_order_of_name(tmp_path):
    drawn = write_pictures(tmp_path, [*CLASSES, "emu/deep/er.jpg.png"])
    (tmp_path / "README.txt").write_text("no image")
    (tmp_path / "cat" / ".hidden.png").write_text("no image")
    data = set_up(tmp_path, num_control=0)
    assert data.classes == ["cat", "dog", "emu"]
    assert len(data.train_set) == 19
    for (name, stored), (image, label, _) in zip(sorted(drawn.items()), data.train_set, strict=True):
        assert np.array_equal(to_bytes(image), stored)
        assert label == data.classes.index(name.split("/")[0])


def test_shards_are_stratified_and_decoded_by_workers(tmp_path):
    write_pictures(tmp_path, CLASSES)
    data = ShardedDataModule(ImageFolderDataModule(tmp_path, num_control=3, batch_size=2, num_workers=2), 2)
    data.setup("fit")
    loader = data.train_dataloader()
    for shard in loader.sampler.shards:
        assert data.train_set.targets[shard].bincount().tolist() == [2, 2, 2]
    assert sorted(index for _, _, indices in loader for index in indices.tolist()) == list(range(12))


def test_images_without_folders_have_no_labels(tmp_path):
    write_pictures(tmp_path, [f"{number}.png" for number in range(9)])
    data = set_up(tmp_path)
    assert not data.classes
    assert not hasattr(data.train_set, "targets")
    assert {label for _, label, _ in data.train_set} == {0}


def test_held_out_images_have_a_folder_of_their_own(tmp_path):
    write_pictures(tmp_path / "train", CLASSES)
    write_pictures(tmp_path / "val", [name for name in CLASSES if not name.startswith("cat")], seed=1)
    data = set_up(tmp_path / "train", held_out=tmp_path / "val")
    assert [len(samples) for samples in (data.train_set, data.control_set, data.reference_set)] == [18, 3, 9]
    assert set(data.control_set.targets.tolist()) == {1, 2}
    write_pictures(tmp_path / "val", ["fox/0.png"])
    with pytest.raises(ValueError, match=r"`held_out` .* the classes \(cat, dog, emu\), but got 'fox/0.png'\. Move"):
        set_up(tmp_path / "train", held_out=tmp_path / "val")


def test_damaged_files_are_named_and_counted(tmp_path):
    write_pictures(tmp_path, CLASSES)
    whole = (tmp_path / "cat/0.png").read_bytes()
    (tmp_path / "cat/0.png").write_bytes(whole[:50])
    (tmp_path / "dog/x.jpg").write_text("no image")
    (tmp_path / "dog/gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"with 3 of 20 that cannot: 'cat/0.png' \(.*'dog/gone.png' \(No such file"):
        set_up(tmp_path)
    data = set_up(tmp_path, on_error="skip")
    assert [skip.name for skip in data.skipped] == ["cat/0.png", "dog/gone.png", "dog/x.jpg"]
    assert len(data.train_set) == 17 - 6
    assert data.train_set.targets.bincount().sum() == 11


def test_images_beside_the_classes_are_refused(tmp_path):
    write_pictures(tmp_path, [*CLASSES, "lost.png"])
    with pytest.raises(ValueError, match=r"`root` .* the classes \(cat, dog, emu\), but got 'lost.png'"):
        set_up(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`root` expected a folder of images, but got '.*', which does not"):
        set_up(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="`root` expected a folder of images, but got None"):
        set_up()
    with pytest.raises(ValueError, match=r"but got '.*', which holds none"):
        set_up(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"`root` expected a folder of images, but got '.*file', which is none"):
        set_up(tmp_path / "file")
    write_pictures(tmp_path, ["a.png"])
    with pytest.raises(FileNotFoundError, match=r"`held_out` expected a folder of images, but got '.*nowhere'"):
        set_up(tmp_path, held_out=tmp_path / "nowhere")
