import numpy as np
import pytest
import torch
from PIL import Image

from lightning_iet.audit import reading
from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.reading import read_images
from lightning_iet.data.sources import open_source
from tests.helpers.image_folders import random_pixels, write_images


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 4)


@pytest.fixture
def read(tmp_path):
    def get(path, **options):
        source = open_source(path, argument="train")
        return read_images(source, BlockCache(tmp_path / "cache"), argument="train", location=str(path), **options)

    return get


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_in_the_order_of_their_names(tmp_path, read, workers, channels):
    pixels = random_pixels(11, channels=channels)
    found = read(write_images(tmp_path / "images", pixels), workers=workers)
    assert torch.equal(found.pixels, pixels)
    assert found.names == [f"{number:05d}.png" for number in range(11)]
    assert not found.skipped


def test_grey_images_among_coloured_ones_are_repeated_over_the_channels(tmp_path, read):
    grey, colour = random_pixels(6), random_pixels(6, seed=1, channels=3)
    write_images(tmp_path / "images", grey)
    found = read(write_images(tmp_path / "images", colour, start=6))
    assert torch.equal(found.pixels, torch.cat([grey.expand(-1, 3, -1, -1), colour]))


def test_what_cannot_be_read_is_listed_and_the_rest_is_used(tmp_path, read):
    pixels = random_pixels(9)
    folder = write_images(tmp_path / "images", pixels)
    whole = (folder / "00004.png").read_bytes()
    (folder / "00004.png").write_bytes(whole[: len(whole) // 2])
    (folder / "00005.png").write_bytes(b"")
    (folder / "00006.png").write_text("no image")
    (folder / "00007.png").unlink()
    (folder / "00007.png").symlink_to("nowhere")
    for _ in range(2):  # the second time out of the cache
        found = read(folder)
        assert torch.equal(found.pixels, torch.cat([pixels[:4], pixels[8:]]))
        assert found.names == ["00000.png", "00001.png", "00002.png", "00003.png", "00008.png"]
        reasons = dict(found.skipped)
        assert list(reasons) == [f"0000{number}.png" for number in (4, 5, 6, 7)]
        assert reasons["00005.png"] == "the file is empty"
        assert reasons["00006.png"] == "not an image that Pillow knows"
        assert reasons["00007.png"] == "No such file or directory"
    with pytest.raises(ValueError, match=r"^Argument `train` expected images that can all be read, .* 4 of 9 .*00004"):
        read(folder, strict=True)


def test_a_folder_of_other_files(tmp_path, read):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"^Argument `train` expected at least one readable image.*1 of 1.*notes.txt"):
        read(tmp_path / "images")


def test_mixed_sizes_need_a_size(tmp_path, read):
    write_images(tmp_path / "images", random_pixels(5))
    folder = write_images(tmp_path / "images", random_pixels(5, size=9), start=5)
    with pytest.raises(ValueError, match=r"one size, but got '0000\d.png' with 8x8 .* '0000\d.png' with 9x9.*--resize"):
        read(folder)
    found = read(folder, size=(4, 6))
    assert found.pixels.shape == (10, 1, 4, 6)
    with Image.open(folder / "00007.png") as image:
        assert np.array_equal(found.pixels[7, 0], np.asarray(image.resize((6, 4), Image.Resampling.BICUBIC)))


def test_images_are_decoded_once_and_again_when_their_bytes_change(tmp_path, read, monkeypatch):
    calls = []
    decode = reading.decode
    monkeypatch.setattr(reading, "decode", lambda data, **kwargs: calls.append(1) or decode(data, **kwargs))
    folder = write_images(tmp_path / "images", random_pixels(9))
    first = read(folder)
    assert len(calls) == 9
    again = read(folder)
    assert len(calls) == 9
    assert torch.equal(first.pixels, again.pixels)
    assert first.sha256 == again.sha256
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "00002.png")
    changed = read(folder)
    assert len(calls) == 13  # the block of the changed image
    assert changed.sha256 != first.sha256
    assert (changed.pixels[2] == 0).all()
    read(folder, size=(4, 4))
    assert len(calls) == 22


def test_a_damaged_cache_is_computed_anew(tmp_path, read):
    pixels = random_pixels(9)
    folder = write_images(tmp_path / "images", pixels)
    read(folder)
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    assert torch.equal(read(folder).pixels, pixels)


def test_floating_point_images_with_nan_are_listed(tmp_path, read):
    images = np.random.default_rng(0).random((5, 8, 8)).astype(np.float32)
    images[3, 0, 0] = np.nan
    np.save(tmp_path / "images.npy", images)
    found = read(tmp_path / "images.npy")
    assert dict(found.skipped) == {"3": "pixels are NaN or infinite"}
    assert found.names == ["0", "1", "2", "4"]
    assert np.array_equal(found.pixels[:, 0], np.rint(images[[0, 1, 2, 4]] * 255))


def read_shared(folder, cache):
    reading.BLOCK = 4
    source = open_source(folder, argument="train")
    found = read_images(source, BlockCache(cache), argument="train", location="here", workers=0)
    return found.pixels, list(found.names), list(found.skipped), found.sha256


def run_shared(folder, cache):
    from lightning_iet.audit.cache import process_group

    with process_group():
        return read_shared(folder, cache)


def test_processes_share_the_work(tmp_path, processes):
    folder = write_images(tmp_path / "images", random_pixels(11))
    (folder / "00005.png").write_bytes(b"")
    alone = read_shared(folder, tmp_path / "alone")
    for found in processes(2).run(run_shared, folder, tmp_path / "shared"):
        assert torch.equal(found[0], alone[0])
        assert found[1:] == alone[1:]
