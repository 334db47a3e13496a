import pytest
import torch

from lightning_iet.data import ImageDataModule, IndexedImages
from lightning_iet.data.decoding import Preparation
from lightning_iet.data.inspection import check_source
from lightning_iet.data.samples import Skip


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
