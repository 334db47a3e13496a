import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_iet.data.decoding import decode
from lightning_iet.data.sources import ArraySource, TarSource, open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)


def contents(source):
    return {source.name(i): decode(source.read(i)) for i in range(len(source))}


def store(folder, names=("b.png", "a.jpg.png", "deep/er/c.bmp")):
    for name, pixels in zip(names, PIXELS, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


def shard(path, folder):
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname=".")
    return path


def test_a_folder_holds_all_files_below_it_sorted_but_no_hidden_ones(tmp_path):
    store(tmp_path)
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "notes.txt").write_text("x")
    source = open_source(tmp_path, argument="train")
    assert [source.name(i) for i in range(len(source))] == ["a.jpg.png", "b.png", "deep/er/c.bmp"]
    assert source.left_alone == "1 .txt"
    assert np.array_equal(decode(source.read(1)), PIXELS[0])


def test_links_are_followed_once(tmp_path):
    store(tmp_path / "images")
    (tmp_path / "images" / "deep" / "circle").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "again").symlink_to(tmp_path / "images" / "deep")
    (tmp_path / "images" / "linked.png").symlink_to(tmp_path / "images" / "b.png")
    (tmp_path / "images" / "gone.png").symlink_to(tmp_path / "nowhere")
    source = open_source(tmp_path / "images", argument="train")
    names = [source.name(i) for i in range(len(source))]
    assert names == ["a.jpg.png", "again/er/c.bmp", "b.png", "gone.png", "linked.png"]
    with pytest.raises(FileNotFoundError):
        source.read(names.index("gone.png"))


def test_pipes_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="not a regular file"):
        open_source(tmp_path, argument="train").read(0)


def test_names_may_hold_any_byte(tmp_path):
    name = os.fsdecode(b"caf\xe9\n<b>.png")
    store(tmp_path, [name])
    assert list(contents(open_source(tmp_path, argument="train"))) == [name]


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_arrays_of_any_layout(tmp_path, layout):
    array = {"NHWC": PIXELS, "NCHW": PIXELS.transpose(0, 3, 1, 2), "NHW": PIXELS[..., 0]}[layout]
    np.save(tmp_path / "images.npy", array)
    expected = PIXELS[..., :1] if layout == "NHW" else PIXELS
    found = contents(open_source(tmp_path / "images.npy", argument="train"))
    assert list(found) == ["0", "1", "2", "3", "4"]
    assert np.array_equal(np.stack(list(found.values())), expected)


def test_where_both_layouts_fit_channels_are_last():
    assert ArraySource(np.zeros((2, 3, 8, 3), np.uint8)).read(0).shape == (3, 8, 3)


def test_of_a_npz_file_the_array_of_images_counts(tmp_path):
    np.savez_compressed(tmp_path / "samples.npz", arr_0=PIXELS, arr_1=np.arange(5))
    assert np.array_equal(open_source(tmp_path / "samples.npz", argument="train").read(3), PIXELS[3])


def test_webdataset_shards(tmp_path):
    store(tmp_path / "images", ["0.png", "1.png", "labels.cls"[:-4] + ".png"])
    (tmp_path / "images" / "0.json").write_text("{}")
    shard(tmp_path / "a.tar", tmp_path / "images")
    (tmp_path / "shards").mkdir()
    for name in ("x-000.tar", "x-001.tar"):
        shard(tmp_path / "shards" / name, tmp_path / "images")
    one = contents(open_source(tmp_path / "a.tar", argument="train"))
    assert len(one) == 3
    assert np.array_equal(next(value for name, value in one.items() if name.endswith("0.png")), PIXELS[0])
    two = contents(open_source(tmp_path / "shards", argument="train"))
    assert len(two) == 6
    assert {name.split("/")[0] for name in two} == {"x-000.tar", "x-001.tar"}


@pytest.mark.parametrize("cut", [1, 512, 10_000])
def test_a_shard_that_is_cut_off_is_refused(tmp_path, cut):
    whole = shard(tmp_path / "a.tar", store(tmp_path / "images")).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # where the archive's last member ends
    (tmp_path / "a.tar").write_bytes(whole[: max(600, end - cut if cut > 1 else end)])
    with pytest.raises(ValueError, match=r"^Argument `train` expected images, but got '.*a.tar', which cannot be read"):
        open_source(tmp_path / "a.tar", argument="train")


def test_other_members_of_a_shard_are_left_alone(tmp_path):
    (tmp_path / "0.txt").write_text("a caption")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "0.txt", arcname="0.txt")
    assert len(TarSource([tmp_path / "a.tar"])) == 0


def test_hugging_face_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra `audit`")
    columns = {"image": [Image.fromarray(pixels) for pixels in PIXELS], "label": list(range(5))}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict(columns, features=features)
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet" / "train-0.parquet")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "split")
    for path in ("saved", "parquet", "parquet/train-0.parquet", "splits/train", "splits:test", "split"):
        found = contents(open_source(tmp_path / path, argument="train"))
        assert np.array_equal(np.stack(list(found.values())), PIXELS)
    with pytest.raises(ValueError, match="several splits; give one of its folders: test, train"):
        open_source(tmp_path / "splits", argument="train")


def test_nothing_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"^Argument `train` expected images, but got '.*', which does not exist"
    ):
        open_source(tmp_path / "nowhere", argument="train")
    with pytest.raises(ValueError, match=r"^Argument `train` expected images, but got '.*', which holds none"):
        open_source(tmp_path, argument="train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", "it is no folder"),
        ("a.npy", b"x", "cannot be read"),
        ("a.npz", b"x", "cannot be read"),
        ("a.tar", b"x" * 600, "cannot be read"),
        ("a.tar", b"", "cannot be read"),
    ],
)
def test_files_of_another_kind(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^Argument `train` expected images, but got .*{message}") as error:
        open_source(tmp_path / name, argument="train")
    assert "\n" not in str(error.value)


def test_arrays_of_other_shapes_and_pickles_are_refused(tmp_path):
    for array in (np.zeros((5, 4)), np.zeros((5, 7, 8, 9)), np.array([{}, {}])):
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        with pytest.raises(ValueError, match="cannot be read"):
            open_source(tmp_path / "a.npy", argument="train")
    whole = PIXELS.tobytes()
    np.save(tmp_path / "a.npy", PIXELS)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[: -len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        open_source(tmp_path / "a.npy", argument="train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path):
    store(tmp_path)
    (tmp_path / "deep").chmod(0)
    try:
        with pytest.raises(ValueError, match="cannot be read"):
            open_source(tmp_path, argument="train")
    finally:
        (tmp_path / "deep").chmod(0o700)


def test_of_a_npz_file_with_several_arrays_one_is_named(tmp_path):
    np.savez(tmp_path / "mnist.npz", train_images=PIXELS, test_images=PIXELS[::-1], train_labels=np.arange(5))
    with pytest.raises(
        ValueError, match=r"holds 2 arrays .* train_images, test_images; give one as mnist.npz:train_im"
    ):
        open_source(tmp_path / "mnist.npz", argument="train")
    found = open_source(tmp_path / "mnist.npz:test_images", argument="train")
    assert np.array_equal(found.read(0), PIXELS[-1])
    for name in ("train_labels", "val_images"):
        with pytest.raises(ValueError, match=rf"none of 3 or 4 dimensions is called '{name}'"):
            open_source(tmp_path / f"mnist.npz:{name}", argument="train")


def test_a_name_with_a_colon_is_a_name(tmp_path):
    store(tmp_path / "a:b")
    assert len(open_source(tmp_path / "a:b", argument="train")) == 3
    with pytest.raises(ValueError, match="a folder of images, which has no 'test'"):
        open_source(tmp_path / "a:b:test", argument="train")


def test_shards_beside_their_tables_and_indices(tmp_path):
    """As img2dataset leaves them, and WebDataset's own tools."""
    store(tmp_path / "images", ["0.png", "1.png"])
    (tmp_path / "images" / "0.txt").write_text("a caption")
    for name in ("00000.tar", "00001.tar"):
        (tmp_path / "shards").mkdir(exist_ok=True)
        shard(tmp_path / "shards" / name, tmp_path / "images")
    for name in ("00000.parquet", "00000_stats.json", "sizes.json", "shard-0.idx", "README.md"):
        (tmp_path / "shards" / name).write_bytes(b"PAR1")
    assert len(open_source(tmp_path / "shards", argument="train")) == 4


def test_a_clone_from_the_hub(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra `audit`")
    columns = {"image": [Image.fromarray(pixels) for pixels in PIXELS]}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image()}))
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    for name in ("README.md", ".gitattributes", "dataset_infos.json"):
        (tmp_path / name).write_text("{}")
    assert len(open_source(tmp_path, argument="train")) == 5
    table.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="several splits; give one"):
        open_source(tmp_path, argument="train")
    assert len(open_source(Path(f"{tmp_path}:test"), argument="train")) == 5
    store(tmp_path / "assets")
    with pytest.raises(ValueError, match="it holds 3 images beside 2 Parquet files: give the path"):
        open_source(tmp_path, argument="train")


def test_splits_side_by_side_are_no_one_set(tmp_path):
    store(tmp_path / "root" / "train")
    store(tmp_path / "root" / "val")
    with pytest.raises(ValueError, match=r"^Argument `train` expected the images of one split.*Give '.*train' alone"):
        open_source(tmp_path / "root", argument="train")
    for name in ("train-0.tar", "val-0.tar"):
        (tmp_path / "shards").mkdir(exist_ok=True)
        shard(tmp_path / "shards" / name, tmp_path / "root" / "train")
    with pytest.raises(ValueError, match=r"^Argument `train` expected the images of one split"):
        open_source(tmp_path / "shards", argument="train")
    assert len(open_source(tmp_path / "shards" / "train-*.tar", argument="train")) == 3
