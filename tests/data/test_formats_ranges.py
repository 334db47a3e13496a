import numpy as np
import pytest
import torch
from PIL import Image

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.reading import Reading, read_images
from lightning_iet.data import HuggingFaceDataModule, ImageDataModule, ImageFolderDataModule
from lightning_iet.data.decoding import Preparation
from lightning_iet.data.formats import format_range, parse_range
from lightning_iet.data.sources import open_source
from tests.helpers.pictures import pixels, to_bytes

GREYS = pixels(12, channels=1)


def write_deep(folder, values):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(values):
        Image.fromarray(image).save(folder / f"{number:02}.{'tif' if image.dtype.kind == 'f' else 'png'}")


def set_up(folder, **kwargs):
    data = ImageFolderDataModule(folder, **{"num_control": 0, "channels": 1, "batch_size": 2} | kwargs)
    data.setup("fit")
    return data


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_training_finds_the_range_and_says_it(tmp_path, caplog, bits):
    top = 2**bits - 1
    deep = np.rint(GREYS / 255 * top).astype(np.uint16)
    write_deep(tmp_path, deep)
    data = set_up(tmp_path)
    for (image, _, _), stored in zip(data.train_set, deep, strict=True):
        assert np.array_equal(to_bytes(image), np.rint(stored.astype(float) / top * 255))
    assert f"12 images of '{tmp_path}' hold integers of more than 8 bits" in caplog.text
    assert f"0 becomes black and {top} white" in caplog.text
    assert data.state_dict()["range"] == f"0:{top}"


def test_a_range_that_is_given_is_kept(tmp_path, caplog):
    write_deep(tmp_path, GREYS.astype(np.uint16) * 16)
    full = set_up(tmp_path, range="full")
    assert max(image.max() for image, _, _ in full.train_set) < 0.07
    assert "0 becomes black and 65535 white" in caplog.text
    half = set_up(tmp_path, range="0:2040")
    image = half.train_set[0][0]
    assert np.array_equal(to_bytes(image), np.rint((GREYS[0] * 16.0).clip(0, 2040) / 2040 * 255))
    assert half.state_dict()["range"] == "0:2040"


def test_training_and_audit_read_the_same(tmp_path):
    write_deep(tmp_path / "images", GREYS.astype(np.uint16) * 16)
    for given in ("auto", "full", "0:3000"):
        data = set_up(tmp_path / "images", range=given)
        trained = np.stack([to_bytes(image) for image, _, _ in data.train_set])
        source = open_source(tmp_path / "images", argument="train")
        reading = Reading(value_range=parse_range(given))
        audited = read_images(
            source, BlockCache(tmp_path / given[:2]), argument="train", location="here", reading=reading
        )
        assert np.array_equal(audited.pixels[:, 0].numpy(), trained)


def test_floating_point_files(tmp_path, caplog):
    write_deep(tmp_path / "unit", (GREYS / 255).astype(np.float32))
    assert np.array_equal(to_bytes(set_up(tmp_path / "unit").train_set[0][0]), GREYS[0])
    assert "hold floating point of more than 8 bits" in caplog.text
    write_deep(tmp_path / "signed", (GREYS / 127.5 - 1).astype(np.float32))
    with pytest.raises(ValueError, match="which of them are black and white is not known"):
        set_up(tmp_path / "signed")
    image = set_up(tmp_path / "signed", range="-1:1").train_set[0][0]
    assert np.abs(to_bytes(image).astype(int) - GREYS[0]).max() <= 1


def test_integers_beside_floating_point_have_no_range_in_common(tmp_path):
    write_deep(tmp_path / "integers", GREYS.astype(np.uint16) * 257)
    write_deep(tmp_path / "floats", (GREYS / 255).astype(np.float32))
    with pytest.raises(ValueError, match=r"`range` expected 'full' or .* side by side, but got 'auto'"):
        set_up(tmp_path)
    data = set_up(tmp_path, range="full")
    images = np.stack([to_bytes(image) for image, _, _ in data.train_set])
    assert np.array_equal(images[: len(GREYS)], images[len(GREYS) :])


def test_without_a_look_at_all_images_a_range_is_wanted(tmp_path):
    write_deep(tmp_path, GREYS.astype(np.uint16) * 16)
    data = set_up(tmp_path, check=False)
    with pytest.raises(ValueError, match="no known range before all are read: give `range`"):
        data.train_set[0]
    assert set_up(tmp_path, check=False, range="0:4095").train_set[0][0].max() <= 1


@pytest.mark.parametrize("form", ["array", "tensor"])
@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.int64])
def test_data_sets_of_ones_own(form, kind):
    class Own(ImageDataModule):
        def load(self):
            deep = [image[None].astype(kind) * 16 for image in GREYS]
            return [torch.from_numpy(i.copy()) for i in deep] if form == "tensor" else [i[0] for i in deep]

    data = Own(num_control=0, channels=1)
    data.setup("fit")
    assert np.array_equal(to_bytes(data.train_set[3][0]), np.rint(GREYS[3] * 16.0 / 4095 * 255))


def test_tensors_of_another_range():
    images = torch.from_numpy(GREYS[:4]).unsqueeze(1) / 127.5 - 1

    class Own(ImageDataModule):
        def load(self):
            return list(images)

    with pytest.raises(ValueError, match=r"not in \[0, 1\]"):
        Own(num_control=0, channels=1).setup("fit")
    data = Own(num_control=0, channels=1, range="-1:1")
    data.setup("fit")
    assert np.array_equal(to_bytes(data.train_set[1][0]), GREYS[1])


@pytest.mark.parametrize("text", ["12", "5:1", "a:b", "0:", "1:1", "FULL"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"^Argument `range` expected the values of black and white"):
        HuggingFaceDataModule(range=text)


@pytest.mark.parametrize("text", ["auto", "full", "0:4095", "-1:1", "-1024:3071", "0:0.5"])
def test_a_range_is_written_as_it_is_read(text):
    assert format_range(parse_range(text)) == text


def test_images_of_8_bits_are_not_touched():
    assert np.array_equal(to_bytes(Preparation(1, value_range=(0, 4095))(GREYS[0])), GREYS[0])
