import io
import json

import numpy as np
import pytest
from PIL import Image

from lightning_iet import ShardedDataModule
from lightning_iet.data import WebDatasetDataModule
from tests.helpers.archives import write_tar
from tests.helpers.pictures import pixels, png, to_bytes

PIXELS = pixels(12)


def samples(numbers, *, suffix="cls", value=lambda number: str(number % 3), folder=""):
    members = {}
    for number in numbers:
        members[f"{folder}{number:03d}.png"] = png(PIXELS[number])
        members[f"{folder}{number:03d}.{suffix}"] = value(number).encode()
    return members


def set_up(root, **kwargs):
    data = WebDatasetDataModule(root, **{"num_control": 0, "batch_size": 2} | kwargs)
    data.setup("fit")
    return data


def test_samples_of_all_shards_by_their_index(tmp_path):
    write_tar(tmp_path / "a-0.tar", samples(range(7)))
    write_tar(tmp_path / "a-1.tar", samples(range(7, 12), folder="./"))
    data = ShardedDataModule(WebDatasetDataModule(tmp_path, num_control=0, batch_size=2, num_workers=1), 2)
    data.setup("fit")
    for number, (image, label, index) in enumerate(data.train_set):
        assert np.array_equal(to_bytes(image), PIXELS[number])
        assert (label, index) == (number % 3, number)
    loader = data.train_dataloader()
    assert sorted(index for _, _, indices in loader for index in indices.tolist()) == list(range(12))
    for shard in loader.sampler.shards:
        assert data.train_set.targets[shard].bincount().tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("suffix", "value", "expected"),
    [
        ("txt", lambda number: f"picture {number}\n", [f"picture {number}" for number in range(4)]),
        ("json", lambda number: json.dumps({"caption": [f"picture {number}"]}), [f"picture {n}" for n in range(4)]),
        ("json", lambda number: json.dumps({"caption": 7 - number}), [7, 6, 5, 4]),
    ],
)
def test_conditions_of_every_kind(tmp_path, suffix, value, expected):
    write_tar(tmp_path / "a.tar", samples(range(4), suffix=suffix, value=value))
    assert [condition for _, condition, _ in set_up(tmp_path / "a.tar").train_set] == expected


def test_conditions_with_suffixes_in_capitals(tmp_path):
    write_tar(tmp_path / "a.tar", samples(range(4), suffix="CLS"))
    assert [condition for _, condition, _ in set_up(tmp_path / "a.tar").train_set] == [0, 1, 2, 0]
    write_tar(tmp_path / "b.tar", samples(range(4), suffix="JSON", value=lambda number: f'{{"caption": "{number}"}}'))
    assert [condition for _, condition, _ in set_up(tmp_path / "b.tar").train_set] == ["0", "1", "2", "3"]


def test_one_of_several_conditions(tmp_path):
    write_tar(tmp_path / "a.tar", samples(range(4)) | samples(range(4), suffix="json", value=lambda _: '{"a": "b"}'))
    assert [label for _, label, _ in set_up(tmp_path).train_set] == [0, 1, 2, 0]
    data = set_up(tmp_path, condition="json", json_key="a")
    assert {caption for _, caption, _ in data.train_set} == {"b"}


def test_images_alone(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{n}.png": png(PIXELS[n]) for n in range(4)} | {"README.md": b"x"})
    data = set_up(tmp_path)
    assert len(data.train_set) == 4
    assert not hasattr(data.train_set, "targets")


def test_what_is_missing_is_named_and_counted(tmp_path):
    members = samples(range(6))
    del members["001.cls"]
    write_tar(tmp_path / "a.tar", members | {"002.cls": b"dog", "003.png": b"no image"})
    message = (
        r"with 3 of 6 that cannot: 'a.tar/001.png' \(has no .cls, or none that can be read\), 'a.tar/002.png'.*003"
    )
    with pytest.raises(ValueError, match=message):
        set_up(tmp_path)
    data = set_up(tmp_path, on_error="skip")
    assert [label for _, label, _ in data.train_set] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"with 6 of 6 that cannot: 'a.tar/000.png' \(has no .txt"):
        set_up(tmp_path, condition="txt", on_error="skip")


def test_held_out_shards(tmp_path):
    write_tar(tmp_path / "train" / "a.tar", samples(range(8)))
    write_tar(tmp_path / "val.tar", samples(range(8, 12)))
    data = set_up(tmp_path / "train", held_out=tmp_path / "val.tar", num_control=3)
    assert [len(part) for part in (data.train_set, data.control_set, data.reference_set)] == [8, 3, 1]


def test_archives_that_are_trained_on_are_not_held_out(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"shard-{number}.tar", samples(range(4 * number, 4 * number + 4)))
    with pytest.raises(ValueError, match="which share images: the model would be trained on images that"):
        set_up(tmp_path / "shard-*.tar", held_out=tmp_path / "shard-2.tar")
    data = set_up(tmp_path / "shard-[01].tar", held_out=tmp_path / "shard-2.tar", num_control=2)
    assert (len(data.train_set), len(data.control_set)) == (8, 2)


def test_every_page_of_a_file_is_an_image(tmp_path):
    pages = [Image.fromarray(image) for image in PIXELS[:3]]
    stack = io.BytesIO()
    pages[0].save(stack, "TIFF", save_all=True, append_images=pages[1:])
    members = {"a.tif": stack.getvalue(), "a.txt": b"a stack", "b.png": png(PIXELS[3]), "b.txt": b"one"}
    write_tar(tmp_path / "a.tar", members)
    data = set_up(tmp_path / "a.tar")
    assert [condition for _, condition, _ in data.train_set] == ["a stack"] * 3 + ["one"]
    assert all(np.array_equal(to_bytes(image), PIXELS[number]) for image, _, number in data.train_set)


def test_captions_stay_where_images_are_repeated(tmp_path):
    write_tar(tmp_path / "a.tar", samples(range(8), suffix="txt", value=lambda number: f"picture {number}"))
    data = set_up(tmp_path / "a.tar", repeated_images=2, repeats=3)
    captions = [condition for _, condition, _ in data.train_set]
    assert len(captions) == 6 + 2 * 3
    assert {caption[:8] for caption in captions} == {"picture "}


def test_what_is_no_shard(tmp_path):
    with pytest.raises(ValueError, match=r"`root` expected a .tar file or a folder of such, but got '.*', which holds"):
        set_up(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"x" * 600)
    with pytest.raises(
        ValueError, match=r"`root` expected whole tar files with one image a sample, but got .* cannot be read"
    ):
        set_up(tmp_path)
    write_tar(tmp_path / "a.tar", samples(range(4)))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:2048])
    with pytest.raises(ValueError, match=r"cannot be read \("):
        set_up(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"but got '.*nowhere', which does not exist"):
        set_up(tmp_path / "nowhere")


@pytest.mark.parametrize(("kwargs", "kind"), [({"condition": "txt"}, str), ({"num_classes": 4}, int), ({}, int)])
def test_the_synthetic_twin(kwargs, kind):
    assert type(set_up(None, synthetic=True, **kwargs).train_set[0][1]) is kind


def test_of_several_images_in_a_sample_one_is_trained_on(tmp_path, caplog):
    members = {}
    for number in range(12):
        members |= {f"{number:03}.png": png(PIXELS[number]), f"{number:03}.mask.png": png(PIXELS[-1 - number])}
        members[f"{number:03}.cls"] = str(number % 2).encode()
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=r"two images of one sample.*`image_key`.*png \(12\), mask.png \(12\)"):
        set_up(tmp_path)
    for key, order in (("png", PIXELS), ("mask.png", PIXELS[::-1])):
        data = set_up(tmp_path, image_key=key)
        assert len(data.train_set) == 12
        for number, (image, label, _) in enumerate(data.train_set):
            assert np.array_equal(to_bytes(image), order[number])
            assert label == number % 2
    assert "these are left alone: 12 .mask.png" in caplog.text


def test_conditions_by_their_whole_ending(tmp_path):
    write_tar(tmp_path / "a.tar", samples(range(4), suffix="caption.txt", value=lambda n: f"picture {n}"))
    assert set_up(tmp_path).train_set[1][1] == "picture 1"
    more = samples(range(4), suffix="caption.txt") | samples(range(4), suffix="tags.txt")
    write_tar(tmp_path / "a.tar", more)
    with pytest.raises(ValueError, match=r"`condition` expected one of caption.txt, tags.txt, since there are several"):
        set_up(tmp_path)
    assert set_up(tmp_path, condition="tags.txt").train_set[1][1] == "1"
    with pytest.raises(ValueError, match="`condition` expected a name that ends in cls, txt, json, but got 'npy'"):
        WebDatasetDataModule(tmp_path, condition="npy")


def test_a_condition_that_is_there_twice_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [*samples(range(4)).items(), ("001.cls", b"2")])
    with pytest.raises(ValueError, match=r"expected one member of a name, but got '001.cls' of '.*a.tar' twice"):
        set_up(tmp_path)


def test_shards_of_several_splits_are_not_mixed(tmp_path):
    for name in ("train-0.tar", "train-1.tar", "val-0.tar"):
        write_tar(tmp_path / name, samples(range(6)))
    with pytest.raises(ValueError, match=r"images of one split.* Give '.*train-\*\.tar' alone, and '.*val-\*\.tar' as"):
        set_up(tmp_path)
    data = set_up(tmp_path / "train-*.tar", held_out=tmp_path / "val-*.tar", num_control=2)
    assert [len(part) for part in (data.train_set, data.control_set, data.reference_set)] == [12, 2, 4]
    folders = {f"{split}/{name}": data for split in ("train", "test") for name, data in samples(range(3)).items()}
    write_tar(tmp_path / "one" / "all.tar", folders)
    with pytest.raises(ValueError, match=r"^Argument `root` expected the images of one split"):
        set_up(tmp_path / "one")


def test_compressed_shards(tmp_path):
    write_tar(tmp_path / "a.tar.gz", samples(range(4)), "w:gz")
    assert [label for _, label, _ in set_up(tmp_path).train_set] == [0, 1, 2, 0]
