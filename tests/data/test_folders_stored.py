import numpy as np
import pytest

from lightning_iet.data.folders import StoredDataModule, StoredSamples
from lightning_iet.data.samples import Skip, labels_of
from lightning_iet.data.sources import ArraySource

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
