import numpy as np
import pytest

from lightning_iet.data.decoding import decode
from lightning_iet.data.sources import TarSource, archives_at, archives_in, open_source
from tests.helpers.archives import write_tar
from tests.helpers.pictures import pixels, png

PIXELS = pixels(6)
FILES = [png(image) for image in PIXELS]


def pairs(*endings):
    return {f"{n:03}.{ending}": FILES[(n + k) % 6] for n in range(6) for k, ending in enumerate(endings)}


def contents(source):
    return [decode(source.read(index)) for index in range(len(source))]


@pytest.mark.parametrize("endings", [("jpg", "mask.png"), ("input.png", "output.png"), ("png", "seg.png", "depth.png")])
def test_of_several_images_in_a_sample_one_is_chosen(tmp_path, endings):
    path = write_tar(tmp_path / "a.tar", pairs(*endings))
    with pytest.raises(
        ValueError, match=rf"two images of one sample, .* choose one by `image_key`.*{endings[0]} \(6\)"
    ):
        TarSource([path])
    for number, ending in enumerate(endings):
        source = TarSource([path], image_key=ending.upper())
        assert len(source) == 6
        assert np.array_equal(contents(source)[0], PIXELS[number])
        assert all(f"6 .{other}" in source.left_alone for other in endings if other != ending)
        audited = open_source(tmp_path / f"a.tar:{ending}", argument="train")
        assert [audited.name(0), len(audited)] == [f"a.tar/000.{ending}", 6]
    with pytest.raises(ValueError, match=r"no image's name ends in \.gif, but in"):
        TarSource([path], image_key="gif")
    with pytest.raises(ValueError, match=r"^Argument `train` expected images, but got .*'a\.tar:"):
        open_source(path, argument="train")


def test_archives_of_several_kinds(tmp_path):
    mixed = [write_tar(tmp_path / "a.tar", pairs("jpg", "mask.png")), write_tar(tmp_path / "b.tar", pairs("png"))]
    assert len(TarSource(mixed, image_key="jpg;png")) == 12
    assert len(TarSource(mixed[1:])) == 6


def test_two_images_of_one_name_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.png", FILES[0]), ("1.png", FILES[1]), ("0.png", FILES[2])])
    for key in (None, "png"):
        with pytest.raises(
            ValueError, match=r"'0.png' and '0.png' of 'a.tar' are two images of one sample and one name"
        ):
            TarSource([path], image_key=key)


def test_samples_of_other_folders_or_archives_are_others(tmp_path):
    members = {f"{folder}/0.png": FILES[0] for folder in ("a", "b.c", "d")}
    paths = [write_tar(tmp_path / name, members) for name in ("x.tar", "y.tar")]
    assert len(TarSource(paths)) == 6


@pytest.mark.parametrize(
    ("suffix", "mode"), [("tar.gz", "w:gz"), ("tgz", "w:gz"), ("tar.bz2", "w:bz2"), ("tar.xz", "w:xz")]
)
def test_compressed_archives(tmp_path, caplog, suffix, mode):
    path = write_tar(tmp_path / f"a.{suffix}", pairs("png"), mode)
    source = open_source(path, argument="train")
    assert np.array_equal(contents(source), PIXELS)
    assert source.name(0) == f"a.{suffix}/000.png"
    assert f"Unpacked '{path}'" in caplog.text
    path.write_bytes(path.read_bytes()[:-40])
    other = path.rename(tmp_path / f"b.{suffix}")
    with pytest.raises(ValueError, match="cannot be read"):
        open_source(other, argument="train")


def test_a_compressed_archive_that_was_replaced_is_read_anew(tmp_path):
    path = tmp_path / "images.tar.gz"
    for content in (b"one", b"another one", b"the last"):
        write_tar(path, {"0.png": content}, mode="w:gz")
        assert TarSource([path]).read(0) == content


def test_what_macos_and_windows_put_into_archives_is_left_alone(tmp_path):
    members = (
        pairs("png")
        | {f"._{n:03}.png": b"\0\5\x16\7" for n in range(6)}
        | {"__MACOSX/._000.png": b"x", "Thumbs.db": b"x"}
    )
    assert len(TarSource([write_tar(tmp_path / "a.tar", members)])) == 6


def test_patterns_and_folders(tmp_path):
    for name in ("train-0.tar", "train-1.tar", "val-0.tar", "train-0.idx", "._train-0.tar"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in archives_at(tmp_path / "train-*.tar")] == ["train-0.tar", "train-1.tar"]
    assert [path.name for path in archives_in(tmp_path)] == ["train-0.tar", "train-1.tar", "val-0.tar"]
    assert archives_at(tmp_path / "train-0.idx") == archives_at(tmp_path) == archives_at(tmp_path / "no-*.tar") == []


def test_what_is_left_alone_in_an_archive_is_said_and_counted(tmp_path):
    """Half of the images in a format that nobody reads are no set of the other half."""
    members = pairs("png", "cls", "npy") | {f"{n}.jxl": b"\xff\x0a" for n in range(100, 105)} | {"README": b"x"}
    source = open_source(write_tar(tmp_path / "a.tar", members), argument="train")
    assert len(source) == 6
    assert source.left_alone == "6 .cls, 6 .npy, 5 .jxl, 1 without a suffix"
    assert source.beside == {".jxl": 5}  # the arrays belong to samples with images
    source = TarSource([tmp_path / "a.tar"], used=[".cls"])
    assert source.left_alone == "6 .npy, 5 .jxl, 1 without a suffix"


def test_images_without_a_suffix_are_told_by_their_first_bytes(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{n}": FILES[n] for n in range(6)} | {"6": b"no image", "7": b""})
    assert np.array_equal(contents(TarSource([path])), PIXELS)
