"""The base of image data modules, by way of small classes of one's own."""

import logging
import warnings
from pathlib import Path

import pytest
import torch
from torchvision.datasets import FakeData

from lightning_iet import ShardedDataModule
from lightning_iet.data import ImageDataModule, IndexedImages
from lightning_iet.data.images import SyntheticImages, absent, damaged, one_line_download
from lightning_iet.data.samples import labels_of
from lightning_iet.data.shard_sampler import ShardPlan
from tests.helpers.models import quiet_trainer, tiny_diffusion
from tests.helpers.pictures import pixels, png


def numbered(count, classes=4):
    """Images that say which one they are by the value of their pixels, brighter on the left."""
    images = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).to(torch.uint8).clone()
    images[..., 0] += 100
    return IndexedImages(images, torch.arange(count) % classes)


class OneSource(ImageDataModule):
    def load(self):
        return numbered(100)


class TwoSources(ImageDataModule):
    def load(self):
        return numbered(100), numbered(40)


class Files(ImageDataModule):
    """Encoded images; ``None`` is an empty file."""

    stored = tuple(png(image) for image in pixels(12))

    def load(self):
        return [b"" if image is None else image for image in self.stored]


def set_up(kind, **kwargs):
    data = kind(**{"num_control": 20, "channels": 1, "batch_size": 10} | kwargs)
    data.setup("fit")
    return data


def numbers(samples):
    return [round(255 * float(image[0, 0, -1])) for image, _, _ in samples]


def test_sets_are_disjoint_and_hold_the_classes_in_equal_shares():
    data = set_up(OneSource, subset=40)
    sets = [data.train_set, data.control_set, data.reference_set]
    assert [len(samples) for samples in sets] == [40, 20, 40]
    assert sorted(number for samples in sets for number in numbers(samples)) == list(range(100))
    for samples in sets:
        assert samples.targets.bincount().tolist() == [len(samples) // 4] * 4
        assert [label for _, label, _ in samples] == [number % 4 for number in numbers(samples)]
        assert [index for _, _, index in samples] == list(range(len(samples)))
    assert data.num_classes == 4


def test_the_split_is_that_of_its_seed():
    first, again, other = (numbers(set_up(OneSource, subset=40, seed=seed).train_set) for seed in (0, 0, 1))
    assert first == again == sorted(first)
    assert first != other


def test_a_held_out_source_is_never_trained_on():
    data = set_up(TwoSources)
    assert numbers(data.train_set) == list(range(100))  # index = position in the source
    assert sorted(numbers(data.control_set) + numbers(data.reference_set)) == list(range(40))


def test_a_set_up_data_module_stays_as_it_is():
    data = set_up(OneSource)
    train = data.train_set
    data.setup("test")
    assert data.train_set is train


def test_nothing_needs_to_be_held_out(tmp_path):
    data = set_up(OneSource, num_control=0)
    assert (len(data.train_set), data.control_set, data.reference_set) == (100, None, None)
    assert data.val_dataloader() == data.test_dataloader() == []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1).fit(tiny_diffusion(), data)


def test_only_training_batches_are_mirrored():
    data = set_up(OneSource, flip=True)
    batches = [image for images, _, _ in data.train_dataloader() for image in images]
    mirrored = sum(float(image[0, 0, 0]) < float(image[0, 0, -1]) for image in batches)
    assert 10 < mirrored < 50
    for samples in (data.train_set, data.control_set, data.reference_set):
        assert all(image[0, 0, 0] > image[0, 0, -1] for image, _, _ in samples)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_are_stratified_and_flips_depend_on_sample_and_epoch_alone(num_workers):
    def flips(rank, processes, epoch):
        data = ShardedDataModule(OneSource(num_control=10, flip=True, channels=1, num_workers=num_workers), 4)
        data.plan = ShardPlan(num_shards=4, num_processes=processes, rank=rank)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for shard in loader.sampler.shards:
            assert data.train_set.targets[shard].bincount().tolist() == [5] * 4
        return {
            int(index): bool(image[0, 0, 0] < image[0, 0, -1])
            for images, _, indices in loader
            for image, index in zip(images, indices, strict=True)
        }

    alone = flips(0, 1, 3)
    assert sorted(alone) == list(range(80))
    assert flips(0, 2, 3) | flips(1, 2, 3) == alone
    if not num_workers:
        assert flips(0, 1, 4) != alone


def test_images_of_mixed_sizes_want_a_size():
    class Mixed(Files):
        stored = tuple(png(pixels(1, size=size)[0]) for size in [(8, 8)] * 3 + [(4, 6)])

    with pytest.raises(ValueError, match=r"`image_size` .* '0' has 8x8 pixels and '3' has 6x4, but got None"):
        set_up(Mixed, num_control=1)
    data = set_up(Mixed, num_control=1, image_size=5, channels=3)
    assert data.train_set[0][0].shape == (3, 5, 5)
    assert set_up(Mixed, num_control=1, image_size=(5, 3)).train_set[0][0].shape == (1, 5, 3)


def test_damaged_images_end_the_run_or_are_left_out(caplog):
    class Damaged(Files):
        stored = (*Files.stored, None, b"no image")

    expected = r"got the data with 2 of 14 that cannot: '12' \(the file is empty\), '13' \(not an image"
    with pytest.raises(ValueError, match=expected) as error:
        set_up(Damaged, num_control=2)
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        data = set_up(Damaged, num_control=2, on_error="skip")
    assert [skip.name for skip in data.skipped] == ["12", "13"]
    assert "Left out 2 of 14 images of the data: '12' (the file is empty)" in caplog.text
    assert sum(len(samples) for samples in (data.train_set, data.control_set, data.reference_set)) == 12
    unchecked = set_up(Damaged, num_control=0, check=False).train_set
    assert len(unchecked) == 14
    with pytest.raises(ValueError, match=r"^Image '12' cannot be read \(the file is empty\)\. With `check: true`"):
        unchecked[12]


def test_some_image_must_be_left():
    class Gone(Files):
        stored = (None,)

    class Empty(Files):
        stored = ()

    with pytest.raises(ValueError, match="1 of 1 that cannot"):
        set_up(Gone, on_error="skip")
    with pytest.raises(ValueError, match=r"expected images, but got the data, which holds none\. Check the path"):
        set_up(Empty)


def test_labels_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"labels 0 … 2, but got 3 for '3' \(25 of 100 are out of range\)"):
        set_up(OneSource, num_classes=3)
    assert set_up(OneSource, num_classes=9).num_classes == 9


def test_more_images_than_there_are_cannot_be_asked_for():
    with pytest.raises(ValueError, match=r"for which 100 images suffice, .* but got 101, 0 and 0"):
        set_up(OneSource, subset=101, num_control=0, num_reference=0)
    with pytest.raises(ValueError, match=r"but got None, 512 and None"):
        set_up(OneSource, num_control=512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` expected an integer ≥ 1, but got 0"),
        ({"num_workers": -1}, "`num_workers` expected an integer ≥ 0, but got -1"),
        ({"channels": 2}, "`channels` expected one of 1, 3, 4, but got 2"),
        ({"fit": "pad"}, "`fit` expected one of 'crop', 'stretch', but got 'pad'"),
        ({"on_error": "ask"}, "`on_error` expected one of 'raise', 'skip', but got 'ask'"),
        ({"image_size": 0}, "`image_size` expected a height and a width ≥ 1, or one number, but got 0"),
        ({"image_size": (8, -1)}, r"but got \(8, -1\)"),
        ({"download": True}, "`download` expected False, since OneSource reads what is there, but got True"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        OneSource(**arguments)


def test_torchvisions_data_sets_are_sources():
    class Fake(ImageDataModule):
        def load(self):
            return FakeData(size=40, image_size=(3, 9, 7), num_classes=2)

    data = set_up(Fake, channels=3, num_control=5)
    assert data.train_set[0][0].shape == (3, 9, 7)
    images, labels, _ = next(iter(data.train_dataloader()))
    assert (len(images), labels.dtype) == (10, torch.int64)


def test_streams_are_refused():
    class Stream(ImageDataModule):
        def load(self):
            return iter([])

    with pytest.raises(TypeError, match="`load` expected to return a map-style data set, or a tuple of two, but got "):
        set_up(Stream)


def test_a_module_without_images_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="ImageDataModule has no method `load`"):
        set_up(ImageDataModule)


@pytest.mark.parametrize("num_classes", [None, 3, 100])
def test_the_synthetic_twin_has_the_same_shape_and_reads_nothing(num_classes):
    class Nowhere(ImageDataModule):
        native_size = (6, 4)

    data = set_up(Nowhere, synthetic=True, num_classes=num_classes, subset=50_000, channels=3)
    assert data.train_set[0][0].shape == (3, 6, 4)
    assert [len(data.control_set), len(data.reference_set)] == [16, 16]
    assert len(data.train_set) == max(64, 16 * (num_classes or 1))
    if num_classes:
        # Enough of each class for ten shards.
        assert data.train_set.targets.bincount(minlength=num_classes).min() >= 10
    assert len(set_up(Nowhere, synthetic=True, subset=5, num_control=0, num_reference=0).train_set) == 5


def test_images_are_random_and_always_the_same():
    images = SyntheticImages(4, channels=3, size=(6, 4), num_classes=2)
    assert torch.equal(images[1][0], images[1][0])
    assert not torch.equal(images[1][0], images[2][0])
    assert not torch.equal(images[1][0], SyntheticImages(4, channels=3, size=(6, 4), seed=1)[1][0])
    assert images[0][0].shape == (3, 6, 4)
    assert labels_of(images).tolist() == [0, 1, 0, 1]


def test_conditions_are_labels_captions_or_nothing():
    assert labels_of(SyntheticImages(4, channels=1, size=(2, 2))) is None
    captioned = SyntheticImages(4, channels=1, size=(2, 2), num_classes=2, captioned=True)
    assert labels_of(captioned) is None
    assert len({captioned[number][1] for number in range(4)}) == 4


def test_what_is_not_there_is_named_with_all_remedies():
    message = str(absent("Pictures", "pictures.bin", Path("here")))
    for part in ("Pictures (pictures.bin)", "'here'", "`download: true`", "`synthetic: true`"):
        assert part in message
    assert "'here'" in str(damaged("Pictures", Path("here")))


@pytest.mark.parametrize("error", [OSError("a\nb"), RuntimeError("a\nb")])
@pytest.mark.parametrize("place", [None, Path("here")])
def test_a_failed_download_is_one_line(error, place):
    failed = r"^Pictures could not be fetched \(a b\)\. Without a network"
    with pytest.raises(ConnectionError, match=failed) as caught, one_line_download("Pictures", place):
        raise error
    assert ("'here'" in str(caught.value)) == (place is not None)
    assert str(caught.value).endswith("as `root`.")
