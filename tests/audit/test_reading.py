import hashlib
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lightning_iet.audit import reading
from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.reading import Reading, read_images, read_sets
from lightning_iet.data.folders import ImageFolderDataModule
from lightning_iet.data.formats import choose_ranges
from lightning_iet.data.sources import open_source
from tests.helpers.image_folders import random_pixels, write_images
from tests.helpers.medical import dicom
from tests.helpers.pictures import png_of_16_bits


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 4)


@pytest.fixture
def read(tmp_path):
    def get(path, **options):
        source = open_source(path, argument="train")
        how = Reading(**options)
        return read_images(source, BlockCache(tmp_path / "cache"), argument="train", location=str(path), reading=how)

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
    with pytest.raises(ValueError, match=r"^Argument `train` expected images, but got .* holds none \(but 1 \.txt\)"):
        read(tmp_path / "images")


def test_mixed_sizes_need_a_size(tmp_path, read):
    write_images(tmp_path / "images", random_pixels(5))
    folder = write_images(tmp_path / "images", random_pixels(5, size=9), start=5)
    with pytest.raises(
        ValueError, match=r"one size, but got '0000\d.png' with 8x8 .* '0000\d.png' with 9x9.*--image-size"
    ):
        read(folder)
    found = read(folder, size=(4, 6), fit="stretch")
    assert found.pixels.shape == (10, 1, 4, 6)
    with Image.open(folder / "00007.png") as image:
        assert np.array_equal(found.pixels[7, 0], np.asarray(image.resize((6, 4), Image.Resampling.BICUBIC)))


def test_images_are_decoded_once_and_again_when_their_bytes_change(tmp_path, read, monkeypatch):
    calls = []
    decode = reading.decode_stored
    monkeypatch.setattr(reading, "decode_stored", lambda data, **kwargs: calls.append(1) or decode(data, **kwargs))
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


@pytest.mark.parametrize(("name", "other"), [("DECODER", reading.DECODER + 1), ("pillow_version", "99.0")])
def test_another_decoder_makes_other_sets(tmp_path, read, monkeypatch, name, other):
    """All that is kept of a set hangs on its hash: of other pixels it would be stale."""
    folder = write_images(tmp_path / "images", random_pixels(9))
    first = read(folder)
    monkeypatch.setattr(reading, name, other)
    assert read(folder).sha256 != first.sha256


def test_the_range_that_was_asked_for_makes_another_set(tmp_path, read):
    """DICOM in its window and over all its bits are both 8 bits, and what is kept of one is stale for the other."""
    pytest.importorskip("pydicom", reason="needs the extra `medical`")
    (tmp_path / "ct").mkdir()
    values = np.random.default_rng(0).integers(0, 4096, (3, 8, 8), dtype=np.uint16)
    for number, image in enumerate(values):
        (tmp_path / f"ct/{number}.dcm").write_bytes(dicom(image, WindowCenter=300, WindowWidth=200))
    auto, full = (read(tmp_path / "ct", value_range=name) for name in ("auto", "full"))
    assert auto.origin.deep == full.origin.deep == 0
    assert not torch.equal(auto.pixels, full.pixels)
    assert auto.sha256 != full.sha256


def test_turned_values_are_not_taken_from_the_cache_of_another_range(tmp_path, read):
    """Of MONOCHROME1, where small values are bright, a range decides what is stored."""
    pytest.importorskip("pydicom", reason="needs the extra `medical`")
    (tmp_path / "xray").mkdir()
    values = np.array([[0, 1000], [2000, 4000]], dtype=np.uint16)
    (tmp_path / "xray/a.dcm").write_bytes(dicom(values, PhotometricInterpretation="MONOCHROME1"))
    for high in (4000, 2000):
        found = read(tmp_path / "xray", value_range=(0.0, float(high)))
        assert np.array_equal(found.pixels[0, 0], np.rint((high - values.astype(float)).clip(0) / high * 255))


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
    found = read_images(source, BlockCache(cache), argument="train", location="here", reading=Reading(workers=0))
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


# --- more than 8 bits, pages, shapes, transparency -------------------------------------------------------------------


def save_deep(folder, pixels, top):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pixels):
        Image.fromarray(np.rint(image * top).astype(np.uint16)).save(folder / f"{number:03d}.png")
    return folder


@pytest.mark.parametrize("top", [100, 255, 600, 1023, 4095, 16383, 65535])
def test_files_of_16_bits_with_fewer_in_them_keep_their_contrast(tmp_path, read, top):
    images = np.random.default_rng(0).random((6, 8, 8))
    images[0, 0, :2] = 0, 1
    found = read(save_deep(tmp_path / "deep", images, top))
    full = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if top < 2**bits)
    assert found.origin.value_range == (0, full)
    assert found.origin.values == (0, top)
    assert found.origin.deep == 6
    expected = np.rint(np.rint(images * top) * 255 / full)
    assert np.array_equal(found.pixels[:, 0], expected)


def test_sets_of_one_kind_share_a_range_and_others_have_their_own(tmp_path):
    images = np.random.default_rng(0).random((4, 8, 8))
    images[:, 0, 0] = 1
    tops = {"generated": 65535, "train": 4095, "held_out": 2000}
    sources = {name: open_source(save_deep(tmp_path / name, images, top), argument=name) for name, top in tops.items()}
    locations = dict.fromkeys(sources, "here")
    found = read_sets(sources, BlockCache(tmp_path / "cache"), locations=locations, reading=Reading())
    ranges = {name: images.origin.value_range for name, images in found.items()}
    assert ranges == {"generated": (0, 65535), "train": (0, 4095), "held_out": (0, 4095)}
    assert int(found["held_out"].pixels.max()) == round(2000 / 4095 * 255)


@pytest.mark.parametrize(
    ("kind", "options", "found"),
    [
        (np.uint16, {}, True),
        (np.float32, {}, False),  # which lies in [0, 1] by convention
        (np.float16, {}, True),  # but here keeps below 0.5
        (np.float16, {"value_range": "full"}, False),
        (np.uint8, {}, False),
        (np.uint16, {"value_range": "full"}, False),
        (np.uint16, {"value_range": (0, 4095)}, False),
    ],
)
def test_the_range_of_integers_is_found_out_and_that_of_dim_floats_is_doubted(tmp_path, read, kind, options, found):
    images = np.random.default_rng(0).random((4, 8, 8))
    scale = {np.float32: 1, np.float16: 0.5}.get(kind)
    np.save(tmp_path / "x.npy", (images * scale if scale else np.rint(images * 255)).astype(kind))
    assert read(tmp_path / "x.npy", **options).origin.range_found == found


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 65535), min_size=1))
def test_a_range_holds_every_value(tops):
    ranges = choose_ranges({name: (0, top) for name, top in tops.items()})
    for name, top in tops.items():
        assert top <= ranges[name][1] <= max(65535, top)
        assert ranges[name][1] in (255, 1023, 4095, 16383, 65535)
        assert ranges[name][1] < 16 * max(top, 64)  # at most a rung too wide for the brightest of its kind


def test_a_range_that_is_given_counts_for_deep_images_only(tmp_path, read):
    np.save(tmp_path / "x.npy", np.array([[[-1.0, 0.0], [0.5, 1.0]]], dtype=np.float32))
    with pytest.raises(ValueError, match=r"1 of 1 unreadable, .* \(floating-point pixels .*--range LOW:HIGH"):
        read(tmp_path / "x.npy")
    assert read(tmp_path / "x.npy", value_range=(-1, 1)).pixels.flatten().tolist() == [0, 128, 191, 255]
    folder = write_images(tmp_path / "plain", random_pixels(3))
    assert torch.equal(read(folder, value_range=(0, 4095)).pixels, random_pixels(3))


def test_integers_of_a_scanner_are_read_by_the_range_that_is_given(tmp_path, read):
    np.save(tmp_path / "ct.npy", np.array([[[-1024, 3071], [0, 9999]]], dtype=np.int16))
    with pytest.raises(ValueError, match="integer pixels lie in"):
        read(tmp_path / "ct.npy")
    assert read(tmp_path / "ct.npy", value_range=(-1024, 3071)).pixels.flatten().tolist() == [0, 255, 64, 255]


def test_integers_beside_floating_point_have_no_range_in_common(tmp_path, read):
    """One range for both made all floating point black; training refuses the same."""
    values = np.random.default_rng(0).random((6, 8, 8)).astype(np.float32)
    folder = save_deep(tmp_path / "mixed", values[:3], 65535)
    for number in range(3, 6):
        Image.fromarray(values[number]).save(folder / f"{number:03d}.tif")
    with pytest.raises(ValueError, match=r"^Argument `range` expected .* side by side in .*mixed', but got 'auto'"):
        read(folder)
    with pytest.raises(ValueError, match=r"^Argument `range` expected .* side by side, but got 'auto'"):
        ImageFolderDataModule(folder, num_control=1, num_reference=1).setup("fit")
    found = read(folder, value_range="full")
    assert np.abs(found.pixels[:, 0].numpy() - values * 255).max() <= 0.51
    assert found.origin.mixed
    data = ImageFolderDataModule(folder, num_control=1, num_reference=1, range="full", channels=1)
    data.setup("fit")
    trained = {(255 * image).round().byte().numpy().tobytes() for image, *_ in data.train_set}
    assert len(trained & {image.numpy().tobytes() for image in found.pixels}) == 4


def test_colours_of_16_bits_are_read_with_the_full_range_only(tmp_path, read):
    """Pillow drops the lower 8: of 12 bits 16 levels would be left."""
    (tmp_path / "scans").mkdir()
    scans = np.random.default_rng(0).integers(0, 4096, (4, 6, 5, 3), dtype=np.uint16)
    for number, scan in enumerate(scans):
        (tmp_path / f"scans/{number}.png").write_bytes(png_of_16_bits(scan))
    for value_range in ("auto", (0.0, 4095.0)):
        with pytest.raises(ValueError, match=r"4 of 4 unreadable, .*upper 8 .*Say --range full if so, or save them in"):
            read(tmp_path / "scans", value_range=value_range)
    with pytest.raises(ValueError, match=r"with 4 of 4 that cannot: .* only the upper 8 can be read: say `range` full"):
        ImageFolderDataModule(tmp_path / "scans", num_control=1, num_reference=1).setup("fit")
    found = read(tmp_path / "scans", value_range="full")
    assert np.abs(found.pixels.permute(0, 2, 3, 1).numpy() - scans / 257).max() <= 1


@pytest.mark.parametrize(("kind", "options"), [("tif", {}), ("gif", {}), ("webp", {"lossless": True}), ("png", {})])
def test_every_page_of_a_file_is_an_image(tmp_path, read, kind, options):
    pages = [Image.fromarray(page[0].numpy()).convert("RGB") for page in random_pixels(5, size=16) // 128 * 128]
    (tmp_path / "stacks").mkdir()
    pages[0].save(tmp_path / f"stacks/a.{kind}", save_all=True, append_images=pages[1:], **options)
    pages[0].save(tmp_path / f"stacks/b.{kind}", **options)
    found = read(tmp_path / "stacks")
    assert list(found.names) == [*(f"a.{kind}, page {number}" for number in range(1, 6)), f"b.{kind}"]
    assert found.origin.pages == 5
    for number, page in enumerate(pages):
        assert np.array_equal(found.pixels[number].permute(1, 2, 0), np.asarray(page))
    file, other = (hashlib.sha256((tmp_path / f"stacks/{name}.{kind}").read_bytes()).hexdigest() for name in "ab")
    assert found.hashes == [*(f"{file}:{number}" for number in range(1, 6)), other]
    source = open_source(tmp_path / "stacks", argument="train", pages="first")
    assert [source.name(index) for index in range(len(source))] == [f"a.{kind}", f"b.{kind}"]


def test_the_bytes_of_a_stack_are_read_and_hashed_once_a_block(tmp_path, read, monkeypatch):
    """A stack of many pages is large: a copy of it for each page would fill the memory."""
    pages = [Image.fromarray(page[0].numpy()) for page in random_pixels(8)]
    (tmp_path / "stacks").mkdir()
    pages[0].save(tmp_path / "stacks/a.tif", save_all=True, append_images=pages[1:])
    source = open_source(tmp_path / "stacks", argument="train")
    assert len({id(source.read(index).data) for index in range(8)}) == 1
    hashed = []
    sha256 = hashlib.sha256
    monkeypatch.setattr(
        reading, "hashlib", SimpleNamespace(sha256=lambda data: hashed.append(len(data)) or sha256(data))
    )
    assert torch.equal(read(tmp_path / "stacks", workers=0).pixels, random_pixels(8))
    assert hashed == [(tmp_path / "stacks/a.tif").stat().st_size] * 2  # blocks of 4 images


def test_pages_in_archives_are_images_too(tmp_path, read):
    pages = [Image.fromarray(page[0].numpy()) for page in random_pixels(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(tmp_path / "a.tif", arcname="a.tif")
    assert torch.equal(read(tmp_path / "set.tar").pixels, random_pixels(3))


def test_shapes_are_changed_only_as_asked(tmp_path, read):
    folder = tmp_path / "wide"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(folder / "a.png")
    with pytest.raises(ValueError, match=r"of the shape of 32x32, but got some of 96x64. .*--fit crop .*--fit stretch"):
        read(folder, size=(32, 32))
    crop, stretch = (read(folder, size=(32, 32), fit=fit).pixels for fit in ("crop", "stretch"))
    assert not torch.equal(crop, stretch)
    assert read(folder, size=(32, 48)).pixels.shape == (1, 3, 32, 48)
    assert read(folder, size=(43, 64)).origin.sizes == {"96x64": 1}  # a third of a pixel is no other shape


def test_transparent_pixels_show_the_background(tmp_path, read):
    (tmp_path / "clear").mkdir()
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "clear" / "a.png")
    Image.new("RGBA", (4, 4), (9, 9, 9, 255)).save(tmp_path / "clear" / "b.png")
    for colour, value in (("white", 255), ("black", 0)):
        found = read(tmp_path / "clear", background=colour)
        assert found.pixels[:, 0, 0, 0].tolist() == [value, 9]
        assert (found.origin.transparent, found.origin.background) == (1, colour)


def test_a_background_that_is_not_named_is_white(tmp_path, read):
    (tmp_path / "clear").mkdir()
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "clear" / "a.png")
    found, named = read(tmp_path / "clear"), read(tmp_path / "clear", background="white")
    assert found.pixels.unique().tolist() == [255]
    assert (found.origin.background, named.origin.background) == (None, "white")
    assert found.sha256 == named.sha256  # of how it was decoded, which is the same


def test_hashes_are_those_of_the_files(tmp_path, read):
    folder = write_images(tmp_path / "images", random_pixels(5))
    found = read(folder)
    assert found.hashes[3] == hashlib.sha256((folder / "00003.png").read_bytes()).hexdigest()
    assert found.origin.kinds == {"PNG": 5}


def test_files_that_cannot_be_read_are_counted_as_files(tmp_path, read):
    """One of two stacks is cut off: one of 5 images, but half of the files."""
    pages = [Image.fromarray(page[0].numpy()) for page in random_pixels(4)]
    (tmp_path / "stacks").mkdir()
    pages[0].save(tmp_path / "stacks/a.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "stacks/b.tif").write_bytes((tmp_path / "stacks/a.tif").read_bytes()[:40])
    found = read(tmp_path / "stacks")
    assert (len(found), len(found.skipped), found.origin.unread) == (4, 1, 0.5)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["tif", "gif"])
def test_a_stack_that_is_cut_off_counts_whole_whatever_is_left_of_it(tmp_path, read, kind, part):
    """Nobody knows how many pages it had."""
    first, *rest = (Image.fromarray(page[0].numpy()) for page in random_pixels(10))
    (tmp_path / "stacks").mkdir()
    for name in "ab":
        first.save(tmp_path / f"stacks/{name}.{kind}", save_all=True, append_images=rest)
    whole = (tmp_path / f"stacks/b.{kind}").read_bytes()
    (tmp_path / f"stacks/b.{kind}").write_bytes(whole[: int(part * len(whole))])
    found = read(tmp_path / "stacks")
    assert len(found) > 10
    assert found.skipped
    assert found.origin.unread == 0.5


@pytest.mark.parametrize(("top", "white"), [(4095, 4095), (65535, 65535), (255, 255)])
@pytest.mark.parametrize("side", [5, 32])
def test_resizing_makes_no_more_bits(tmp_path, read, top, white, side):
    """A bicubic filter overshoots at edges: its values must not be taken for those of a wider range."""
    edges = np.zeros((3, 16, 16), dtype=np.uint16)
    edges[:, 4:12, 4:12] = top
    np.save(tmp_path / "edges.npy", edges)
    found = read(tmp_path / "edges.npy", size=(side, side), fit="stretch")
    assert found.origin.value_range == (0, white)
    assert found.origin.values == (0, top)
    assert found.pixels.amax() == 255
