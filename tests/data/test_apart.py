"""Held-out images are not trained on, whatever their place."""

import json

import numpy as np
import pytest
from PIL import Image

from lightning_iet.data import (
    CaptionFolderDataModule,
    HuggingFaceDataModule,
    ImageFolderDataModule,
    WebDatasetDataModule,
)
from lightning_iet.data.captions import read_captions


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def store(folder, count=3):
    folder.mkdir(parents=True)
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"image\u2028{n}"}, ensure_ascii=False) for n in range(count)]
    (folder / "metadata.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", [CaptionFolderDataModule, ImageFolderDataModule, WebDatasetDataModule])
@pytest.mark.parametrize("swapped", [False, True])
def test_folders_within_one_another_are_refused(tmp_path, kind, swapped):
    outer, inner = store(tmp_path / "root"), store(tmp_path / "root" / "val")
    root, held_out = (inner, outer) if swapped else (outer, inner)
    with pytest.raises(ValueError, match="`held_out` expected a place beside `root`"):
        kind(root, held_out=held_out).setup("fit")


def test_captions_with_rare_line_ends_and_a_byte_order_mark(tmp_path):
    assert sorted(map(str, read_captions(store(tmp_path / "root") / "metadata.jsonl").values())) == [
        f"image\u2028{n}" for n in range(3)
    ]


@pytest.mark.parametrize("names", [("train_00", "test_00"), ("training-00000", "test-00000"), ("all", "all")])
def test_parquet_files_that_are_not_told_apart_are_refused(tmp_path, names):
    datasets = pytest.importorskip("datasets")
    for seed, name in enumerate(names):
        table = datasets.Dataset.from_dict({"image": [picture(seed)] * 4}).cast_column("image", datasets.Image())
        table.to_parquet(tmp_path / f"{name}.parquet")
    data = HuggingFaceDataModule(tmp_path, held_out_split="test", num_control=2)
    if names[0] == names[1]:
        with pytest.raises(ValueError, match="`held_out_split` expected files of their own"):
            data.setup("fit")
    else:
        data.setup("fit")
        assert [len(part) for part in (data.train_set, data.control_set, data.reference_set)] == [4, 2, 2]
