import pytest
import torch

from lightning_iet.data import ImageDataModule, IndexedImages, images
from lightning_iet.data.decoding import Preparation
from lightning_iet.data.images import check_labels, check_sizes, check_source, inspect
from lightning_iet.data.samples import Skip
from tests.helpers.pictures import pixels, png

WIDE, HIGH = pixels(1, size=(4, 6))[0], pixels(1, size=(6, 4))[0]


class Files(list):
    def name(self, index):
        return f"{index}\n.png"


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_is_looked_at_once(monkeypatch, workers):
    monkeypatch.setattr(images, "BATCH", 2)
    stored = Files([png(WIDE), b"", (png(HIGH), "caption"), b"no image", png(WIDE)[:40], torch.full((1, 2, 2), 1.5)])
    usable, skipped, sizes, _ = inspect(stored, Preparation(3), workers=workers)
    assert usable.tolist() == [0, 2]
    assert sizes == {(4, 6): "0\\n.png", (6, 4): "2\\n.png"}
    assert [skip.name for skip in skipped] == [f"{number}\\n.png" for number in (1, 3, 4, 5)]
    assert skipped[0].reason == "the file is empty"
    assert skipped[1].reason == "not an image that Pillow knows"
    assert skipped[3].reason == "values from 1.5 to 1.5, not in [0, 1]"
    assert all("\n" not in skip.reason for skip in skipped)


def test_nan_is_no_image():
    assert "nan" in inspect([torch.full((1, 2, 2), float("nan"))], Preparation(1))[1][0].reason


def test_many_images_are_read_by_all_cores(monkeypatch):
    assert images._workers(images.FEW) == 0
    monkeypatch.setattr(images.os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert images._workers(images.FEW + 1) == 2


def test_mixed_sizes_are_refused():
    check_sizes({(4, 6): "a"})
    with pytest.raises(ValueError, match="'a' has 6x4 pixels and 'b' has 4x6, but got None"):
        check_sizes({(4, 6): "a", (6, 4): "b"})


def test_labels_out_of_range_are_refused():
    files = Files("abc")
    check_labels(files, torch.tensor([0, 2, 1]), 3)
    check_labels(files, torch.tensor([0, 99, 1]), None)
    with pytest.raises(ValueError, match=r"labels 0 … 1, but got 2 for '1\\n.png' \(1 of 3 are out of range\)"):
        check_labels(files, torch.tensor([0, 2, 1]), 2)
    with pytest.raises(ValueError, match="labels from 0, but got -1 for '0"):
        check_labels(files, torch.tensor([-1, 2, 1]), None)


class Labelled(list):
    def __init__(self, labels, skipped=()):
        super().__init__([torch.zeros(1, 2, 2)] * len(labels))
        self.targets = labels
        self.skipped = list(skipped)


def checked(source, **kwargs):
    return check_source(source, Preparation(1), where="'here'", **kwargs)


def test_selected_sets_are_disjoint_and_ascending_and_usable():
    source = Labelled([0, 0, 1, 1, 0, 0, 1, 1, 0])
    source[4] = torch.full((1, 2, 2), 2.0)
    usable = checked(source, skip=True)
    assert usable.indices.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    first, second = usable.select([4, 2], seed=0)
    assert first.tolist() == sorted(first.tolist())
    assert not {*first.tolist()} & {*second.tolist()}
    assert [source.targets[i] for i in first].count(1) == 2
    assert {*first.tolist(), *second.tolist()} <= set(usable.indices.tolist())


def test_what_a_source_has_left_out_itself_counts():
    source = Labelled([0, 1], skipped=[Skip("a.png", "has no caption")])
    with pytest.raises(ValueError, match=r"'here' with 1 of 3 that cannot: 'a.png' \(has no caption\)"):
        checked(source)
    assert checked(source, skip=True).skipped == [Skip("a.png", "has no caption")]
    assert source.skipped == [Skip("a.png", "has no caption")]


def test_images_in_memory_are_not_read_beforehand(monkeypatch):
    monkeypatch.setattr(IndexedImages, "__getitem__", None)

    class Images(ImageDataModule):
        def load(self):
            return IndexedImages(torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.long))

    data = Images(num_control=0, channels=1)
    data.setup("fit")
    assert len(data.train_set) == 3
