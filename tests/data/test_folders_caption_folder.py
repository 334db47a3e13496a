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
