import json

import numpy as np
import pytest

from lightning_iet import ShardedDataModule
from lightning_iet.data import CaptionFolderDataModule
from tests.helpers.pictures import to_bytes, write_pictures

NAMES = [f"{number}.png" for number in range(6)] + ["deep/6.png"]


def write(folder, captions, name="captions.json"):
    drawn = write_pictures(folder, NAMES)
    text = "\n".join(map(json.dumps, captions)) if name.endswith("l") else json.dumps(captions)
    (folder / name).write_text(text)
    return drawn


def set_up(*args, **kwargs):
    data = CaptionFolderDataModule(*args, **{"num_control": 0, "batch_size": 2} | kwargs)
    data.setup("fit")
    return data


def of_laion(names):
    """As it is found beside LAION-10k: paths of another machine, lists of captions."""
    return {f"/elsewhere/laion_10k/train/{name}": [f"picture {name}", "another"] for name in names}


def test_both_forms_give_each_image_its_caption(tmp_path):
    drawn = write(tmp_path / "json", of_laion(NAMES))
    write(tmp_path / "jsonl", [{"file_name": name, "text": f"picture {name}"} for name in NAMES], "metadata.jsonl")
    for form in ("json", "jsonl"):
        data = set_up(tmp_path / form)
        assert [caption for _, caption, _ in data.train_set] == [f"picture {name}" for name in NAMES]
        for name, (image, _, index) in zip(NAMES, data.train_set, strict=True):
            assert np.array_equal(to_bytes(image), drawn[name])
            assert index == NAMES.index(name)


def test_a_batch_holds_a_list_of_captions(tmp_path):
    write(tmp_path, of_laion(NAMES))
    data = ShardedDataModule(CaptionFolderDataModule(tmp_path, num_control=0, batch_size=2, num_workers=1), 2)
    data.setup("fit")
    seen = [(caption, int(index)) for _, captions, indices in data.train_dataloader()
            for caption, index in zip(captions, indices, strict=True)]  # fmt: skip
    assert sorted(seen, key=lambda pair: pair[1]) == [(f"picture {name}", i) for i, name in enumerate(NAMES)]


def test_what_is_missing_is_named_and_counted(tmp_path, caplog):
    write(tmp_path, of_laion(NAMES[1:]) | {"gone.png": ["a ghost"], "0.png": [""]})
    with pytest.raises(ValueError, match=r"with 1 of 7 that cannot: '0.png' \(has no caption\)\. Mend"):
        set_up(tmp_path)
    data = set_up(tmp_path, on_error="skip")
    assert [skip.name for skip in data.skipped] == ["0.png"]
    assert [caption for _, caption, _ in data.train_set] == [f"picture {name}" for name in NAMES[1:]]
    assert "1 captions belong to no image in" in caplog.text
    assert "'gone.png' (no such image)" in caplog.text


def test_files_elsewhere_and_held_out_images(tmp_path):
    write(tmp_path / "train", of_laion(NAMES))
    write(tmp_path / "val", of_laion(NAMES), "their.json")
    (tmp_path / "train" / "captions.json").rename(tmp_path / "all.json")
    data = set_up(
        tmp_path / "train",
        captions=tmp_path / "all.json",
        held_out=tmp_path / "val",
        held_out_captions=tmp_path / "val" / "their.json",
        num_control=3,
    )
    assert [len(samples) for samples in (data.train_set, data.control_set, data.reference_set)] == [7, 3, 4]
    with pytest.raises(FileNotFoundError, match=r"`held_out_captions` expected a file of captions, but got None, and"):
        set_up(tmp_path / "train", captions=tmp_path / "all.json", held_out=tmp_path / "val")
    with pytest.raises(FileNotFoundError, match=r"`captions` expected .* there is no '.*metadata.jsonl', .*json'"):
        set_up(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=r"`captions` expected .* but got other.json, and there is no 'other"):
        set_up(tmp_path / "train", captions="other.json")


def test_no_caption_fits(tmp_path):
    write(tmp_path, {"elsewhere.png": "x"})
    with pytest.raises(ValueError, match=r"with 7 of 7 that cannot"):
        set_up(tmp_path, on_error="skip")


@pytest.mark.parametrize("form", ["a.txt", "a.caption", "a.png.txt"])
def test_text_files_beside_images(tmp_path, caplog, form):
    write_pictures(tmp_path, NAMES)
    for name in NAMES:
        beside = (tmp_path / name).with_suffix("") if form != "a.png.txt" else tmp_path / name
        beside.with_name(beside.name + "." + form.rpartition(".")[2]).write_text(f"picture {name}\nand more\n")
    (tmp_path / "README.txt").write_text("no caption")
    data = set_up(tmp_path)
    assert [caption for _, caption, _ in data.train_set] == [f"picture {name}" for name in NAMES]
    assert "7 text files in" in caplog.text
    (tmp_path / "0.caption").write_text("another")
    (tmp_path / "0.txt").write_text("another")
    with pytest.raises(ValueError, match=r"one text file beside each image, but got .* beside '0.png'"):
        set_up(tmp_path)


@pytest.mark.parametrize("content", [[b"one", b"two"], [b"\xff\xfe"]], ids=["two files", "no UTF-8"])
def test_text_files_beside_held_out_images_are_refused_by_their_option(tmp_path, content):
    for folder in ("train", "val"):
        write_pictures(tmp_path / folder, NAMES)
        for name in NAMES:
            (tmp_path / folder / name).with_suffix(".txt").write_text("x")
    for suffix, text in zip((".txt", ".caption"), content, strict=False):
        (tmp_path / "val" / NAMES[0]).with_suffix(suffix).write_bytes(text)
    with pytest.raises(ValueError, match=r"Argument `held_out_captions` expected .*text file"):
        set_up(tmp_path / "train", held_out=tmp_path / "val")


def test_an_image_without_a_text_file_is_named(tmp_path):
    write_pictures(tmp_path, NAMES)
    for name in NAMES[1:]:
        (tmp_path / name).with_suffix(".txt").write_text("x")
    with pytest.raises(ValueError, match=r"with 1 of 7 that cannot: '0.png' \(has no caption\)"):
        set_up(tmp_path)


def test_a_list_in_each_folder(tmp_path):
    drawn = write_pictures(tmp_path, ["a/1.png", "a/2.png", "b/1.png", "3.png"])
    for folder, numbers in (("a", (1, 2)), ("b", (1,)), (".", (3,))):
        lines = [json.dumps({"file_name": f"{number}.png", "text": f"{folder} {number}"}) for number in numbers]
        (tmp_path / folder / "metadata.jsonl").write_text("\n".join(lines))
    data = set_up(tmp_path)
    assert [caption for _, caption, _ in data.train_set] == [". 3", "a 1", "a 2", "b 1"]
    assert len(drawn) == 4
    (tmp_path / "a" / "metadata.csv").write_text("file_name,text\n1.png,x")
    with pytest.raises(
        ValueError, match=r"`captions` expected to say which list .* holds metadata.csv and metadata.json"
    ):
        set_up(tmp_path)


def test_a_list_goes_before_text_files_with_a_word(tmp_path, caplog):
    write(tmp_path, [{"file_name": name, "text": "listed"} for name in NAMES], "metadata.jsonl")
    (tmp_path / "0.txt").write_text("beside")
    (tmp_path / "0.caption").write_text("another one, of which none is asked for")
    assert {caption for _, caption, _ in set_up(tmp_path).train_set} == {"listed"}
    assert "1 text files beside images are left alone" in caplog.text


def test_captions_of_another_key(tmp_path):
    write(tmp_path, [{"file_name": name, "blip_caption": f"picture {name}"} for name in NAMES], "metadata.jsonl")
    with pytest.raises(ValueError, match="caption_key"):
        set_up(tmp_path)
    assert set_up(tmp_path, caption_key="blip_caption").train_set[0][1] == "picture 0.png"


def test_splits_and_masks_are_refused_here_too(tmp_path):
    write(tmp_path / "a", [], "metadata.jsonl")
    write_pictures(tmp_path / "a", ["train/0.png", "val/0.png"])
    with pytest.raises(ValueError, match="expected the images of one split"):
        set_up(tmp_path / "a")
