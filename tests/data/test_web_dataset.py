import io
import json
import tarfile

import numpy as np
import pytest

from lightning_iet import ShardedDataModule
from lightning_iet.data import WebDatasetDataModule
from tests.helpers.pictures import pixels, png, to_bytes

PIXELS = pixels(12)


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


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


def test_what_is_no_shard(tmp_path):
    with pytest.raises(ValueError, match=r"`root` expected a .tar file or a folder of such, but got '.*', which holds"):
        set_up(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"x" * 600)
    with pytest.raises(
        ValueError, match=r"`root` expected whole tar files without compression, but got .* cannot be read"
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
