import unicodedata

import numpy as np
import pytest

from lightning_iet import ShardedDataModule
from lightning_iet.data import ImageFolderDataModule
from lightning_iet.data.folders import StoredDataModule, StoredSamples
from lightning_iet.data.samples import Skip, labels_of
from lightning_iet.data.sources import ArraySource
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


def test_a_class_without_images_is_refused_and_keeps_no_other_from_its_number(tmp_path):
    write_pictures(tmp_path, CLASSES)
    (tmp_path / "deer").mkdir()
    (tmp_path / "@eaDir").mkdir()
    with pytest.raises(
        ValueError, match=r"^Argument `root` expected images in each folder .* got none in 'deer'\. Rem"
    ):
        set_up(tmp_path)
    (tmp_path / "deer" / "0.cr2").write_bytes(b"II*")
    with pytest.raises(ValueError, match=r"got none in 'deer' \(but 1 \.cr2\)\..* `exclude: deer/\*`"):
        set_up(tmp_path)
    assert set_up(tmp_path, exclude="deer/*").classes == ["cat", "dog", "emu"]


def test_images_that_an_extra_reads_are_not_dropped(tmp_path):
    write_pictures(tmp_path, CLASSES)
    for name in ("cat/x.heic", "dog/x.dcm", "emu/x.nii.gz"):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=r"with 3 of 21 that cannot: 'cat/x.heic' \(.*'dog/x.dcm' \(.*'emu/x.nii.gz' \("
    ):
        set_up(tmp_path)


def test_a_class_whose_images_cannot_be_read_keeps_its_number(tmp_path):
    write_pictures(tmp_path, [*CLASSES, "deer/0.png"])
    (tmp_path / "deer" / "0.png").write_bytes(b"damaged")
    data = set_up(tmp_path, on_error="skip", num_control=0)
    assert data.classes == ["cat", "deer", "dog", "emu"]
    assert set(data.train_set.targets.tolist()) == {0, 2, 3}


def test_what_is_left_alone_is_one_line(tmp_path, caplog):
    write_pictures(tmp_path, [*CLASSES, "$RECYCLE.BIN/0.png", "lost+found/0.png", "cat/@eaDir/0.png/x.png"])
    for name in ("cat/0.xml", "dog/1.xml", "labels.csv"):
        (tmp_path / name).write_text("x")
    data = set_up(tmp_path)
    assert data.classes == ["cat", "dog", "emu"]
    said = [record.message for record in caplog.records if "Left alone" in record.message]
    assert said == [
        f"Left alone in '{tmp_path}': 2 .xml, 1 .csv, 1 in $RECYCLE.BIN, 1 in @eaDir, 1 in lost+found; "
        "18 images are read."
    ]


@pytest.mark.parametrize("folders", [("train", "val", "test"), ("a/train", "a/test")])
def test_splits_side_by_side_are_refused(tmp_path, folders):
    write_pictures(tmp_path, [f"{folder}/{name}" for folder in folders for name in CLASSES])
    with pytest.raises(ValueError, match=r"^Argument `root` expected the images of one split, but got .*train"):
        set_up(tmp_path)
    if folders[0] == "train":
        data = set_up(tmp_path / "train", held_out=tmp_path / "val")
        assert data.classes == ["cat", "dog", "emu"]


def test_masks_beside_their_pictures_are_refused_until_it_is_said_what_they_are(tmp_path):
    write_pictures(tmp_path, [*CLASSES, "cat/0_mask.png"])
    with pytest.raises(ValueError, match=r"^Argument `exclude` .* 'cat/0_mask.png' looks like the mask of 'cat/0.png'"):
        set_up(tmp_path)
    assert len(set_up(tmp_path, exclude=["*_mask.png"], num_control=0).train_set) == 18
    assert len(set_up(tmp_path, exclude=[], num_control=0).train_set) == 19


def test_names_of_classes_with_accents_are_the_same_in_either_form(tmp_path):
    for root, form in (("train", "NFC"), ("val", "NFD")):
        name = unicodedata.normalize(form, "caf\u00e9")
        write_pictures(tmp_path / root, [f"{name}/{n}.png" for n in range(4)] + ["tea/0.png"])
    data = set_up(tmp_path / "train", held_out=tmp_path / "val")
    assert set(data.control_set.targets.tolist()) <= {0, 1}
    assert data.classes == ["caf\u00e9", "tea"]


SOURCE = ArraySource(np.arange(12, dtype=np.uint8).reshape(3, 2, 2))


def test_conditions_are_labels_captions_or_nothing():
    plain, labelled, captioned = (StoredSamples(SOURCE, found) for found in (None, [2, 1, 0], ["a", "b", "c"]))
    assert [plain[1][1], labelled[1][1], captioned[1][1]] == [0, 1, "b"]
    assert [labels_of(plain), labels_of(captioned)] == [None, None]
    assert labels_of(labelled).tolist() == [2, 1, 0]


def test_images_without_a_condition_are_left_out():
    samples = StoredSamples(SOURCE, ["a", None, "c"], missing="has no caption")
    assert [(image.tolist(), caption) for image, caption in samples] == [
        ([[0, 1], [2, 3]], "a"),
        ([[8, 9], [10, 11]], "c"),
    ]
    assert [samples.name(0), samples.name(1)] == ["0", "2"]
    assert samples.skipped == [Skip("1", "has no caption")]
    assert len(StoredSamples(SOURCE, [None] * 3)) == 0


def test_a_subclass_says_how_to_open_what_is_there(tmp_path):
    class Pairs(StoredDataModule):
        def open(self, path, *, argument):
            return argument, path.name

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert Pairs(tmp_path / "a").load() == ("root", "a")
    assert Pairs(tmp_path / "a", held_out=tmp_path / "b").load() == (("root", "a"), ("held_out", "b"))
    with pytest.raises(FileNotFoundError, match=r"`held_out` expected a folder of images, but got '.*c', which does"):
        Pairs(tmp_path / "a", held_out=tmp_path / "c").load()
