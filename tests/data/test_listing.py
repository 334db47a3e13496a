import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.data.listing import (
    check_one_split,
    is_system,
    list_folder,
    masks_among,
    splits_among,
    without_excluded,
)
from lightning_iet.data.sources import FolderSource, open_source, unread_beside
from tests.helpers.pictures import pixels, png, write_pictures

SYSTEM = [
    "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", "a/@eaDir/0.jpg/x.png", "$RECYCLE.BIN/$R1.png", "lost+found/1.png",
    "__MACOSX/a/._1.png", "a/._1.png", ".ipynb_checkpoints/1-checkpoint.png", ".Trash-1000/files/1.png",
    "@Recycle/1.png",
    "#recycle/1.png", "System Volume Information/1.png", "Thumbs.db", "a/desktop.ini", ".DS_Store", "RECYCLER/1.png",
    "~$table.png", "@__thumb/1.png", "#snapshot/x/1.png",
]  # fmt: skip
OURS = ["a/1.png", "recycler/1.png", "#1.png", "@home/1.png", "trash/1.png", "a.b/c.d/1.png", "lost/found.png"]


@pytest.mark.parametrize("name", SYSTEM)
def test_what_systems_and_drives_keep_is_left_alone(tmp_path, name):
    assert is_system(name)
    write_pictures(tmp_path, ["a/1.png"])
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(png(pixels(1)[0]))
    assert list_folder(tmp_path).files == ["a/1.png"]


@pytest.mark.parametrize("name", OURS)
def test_a_persons_folders_are_not(name):
    assert not is_system(name)


def test_images_are_told_by_suffix_and_else_by_their_first_bytes(tmp_path):
    picture = png(pixels(1)[0])
    dicom = bytes(128) + b"DICM"
    files = {
        "a.PNG": b"whatever", "b.jpg_large": picture, "IM0001": dicom, "1.2.840.7": dicom, "c": picture,
        "scan.dcm": b"", "d.txt": picture, "e.cr2": b"II*\0" + bytes(50), "f": b"text", "g.pdf": b"%PDF",
        "h.heic": b"", "brain.nii.gz": b"",
        "DICOMDIR": dicom,
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    images, others = list_folder(tmp_path).images()
    assert set(images) == {
        "a.PNG", "b.jpg_large", "IM0001", "1.2.840.7", "c", "scan.dcm", "h.heic", "brain.nii.gz"
    }  # fmt: skip
    assert others == {".txt": 1, ".cr2": 1, "": 1, ".pdf": 1}


def test_what_is_left_alone_is_said_by_suffix_and_number(tmp_path):
    write_pictures(tmp_path, [f"a/{n}.png" for n in range(3)] + ["@eaDir/0.png", "@eaDir/1/2.png", "a/0_mask.png"])
    for name in ("a/0.xml", "a/1.xml", "readme.md", "LICENSE"):
        (tmp_path / name).write_text("x")
    source = FolderSource(tmp_path, exclude=["*_mask*"])
    assert source.left_alone == "2 .xml, 1 without a suffix, 1 .md, 2 in @eaDir, 1 by `exclude`"
    assert source.names == ["a/0.png", "a/1.png", "a/2.png"]


def test_a_long_list_of_suffixes_is_summed_up(tmp_path):
    for number in range(11):
        (tmp_path / f"x.{number}z").write_text("x")
    assert FolderSource(tmp_path).left_alone.endswith("3 of other kinds")


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train", "val"), ("training", "test"), ("Train", "TEST"), ("train", "validation"), ("trn", "holdout"),
        ("train2017", "val2017"), ("trainA", "testA"), ("seg_train", "seg_test"), ("DIV2K_train_HR", "DIV2K_valid_HR"),
        ("x/train", "x/test"), ("train", "held_out"), ("a/b/train-images", "a/b/dev-images"),
    ],
)  # fmt: skip
def test_splits_side_by_side_are_found(tmp_path, train, held_out):
    names = ["0.png", f"{train}/cat/1.png", f"{held_out}/cat/1.png", "other/x.png"]
    assert splits_among(names) == (train, held_out)
    with pytest.raises(ValueError, match=r"^Argument `root` expected the images of one split.*would be taken alike"):
        check_one_split(names, tmp_path, argument="root")


@pytest.mark.parametrize(
    "names",
    [
        ["train/1.png", "bus/1.png"],
        ["train/a/1.png", "train/b/1.png"],
        ["val/1.png", "test/1.png"],
        ["a/train/1.png", "b/test/1.png"],
        ["bullet train/1.png", "crash test/1.png"],
        ["trainers/1.png", "testers/1.png"],
        ["train.png", "test.png"],
    ],
)
def test_other_folders_are_no_splits(tmp_path, names):
    assert splits_among(names) is None
    check_one_split(names, tmp_path, argument="root")


@pytest.mark.parametrize("word", ["mask", "MASK", "seg", "gt", "label", "segmentation"])
@pytest.mark.parametrize("form", ["{stem}_{word}.png", "{stem}-{word}.jpg", "{stem}.{word}.png", "{stem}_{word}_1.png"])
def test_masks_beside_their_pictures_are_found(word, form):
    mask = "a/" + form.format(stem="007", word=word)
    assert masks_among(["a/006.png", "a/007.png", mask]) == ("a/007.png", mask)


@given(st.lists(st.text("abcmask_123", min_size=1), unique=True))
def test_a_mask_needs_a_picture(stems):
    found = masks_among([f"{stem}.png" for stem in stems])
    if found is not None:
        picture, mask = found
        assert mask.startswith(picture.removesuffix(".png"))
        assert "mask" in mask


@pytest.mark.parametrize(
    ("pictures", "masks"), [("images", "masks"), ("JPEGImages", "SegmentationClass"), ("x/img", "x/gt")]
)
def test_folders_of_masks_beside_folders_of_pictures(pictures, masks):
    names = [f"{pictures}/{n}.jpg" for n in range(3)] + [f"{masks}/1.png"]
    assert masks_among(names) == (f"{pictures}/1.jpg", f"{masks}/1.png")
    assert masks_among(names[:3]) is None


def test_patterns_are_of_whole_names_or_of_the_last_part():
    names = ["a/1.png", "a/b/1_mask.png", "masks/1.png"]
    assert without_excluded(names, ["*_mask.png"]) == ["a/1.png", "masks/1.png"]
    assert without_excluded(names, ["masks/*", "b"]) == names[:2]
    assert without_excluded(names, []) == names


def test_the_first_bytes_of_a_file_are_enough(tmp_path):
    (tmp_path / "a").write_bytes(np.arange(256, dtype=np.uint8).tobytes() * 100)
    assert len(list_folder(tmp_path).head("a")) == 4096


def test_files_that_may_hold_images_are_counted_but_not_what_belongs_to_an_image(tmp_path):
    names = ["a/1.png", "a/2.png", "a/1.npz", "a/1_latent.npz", "a/1.txt", "a/9.npz", "b/1.npz", "b.1/2.npz", "a.jxl"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert FolderSource(tmp_path).beside == {".npz": 3, ".jxl": 1}
    assert FolderSource(tmp_path, used=[".npz"]).beside == {".jxl": 1}
    assert unread_beside(open_source(tmp_path, argument="train")) == {".npz": 3, ".jxl": 1}
