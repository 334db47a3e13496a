import pytest

from lightning_iet.data.sources import one_split, splits_at


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder, configuration=None):
    splits = splits_at(folder, configuration)
    return {split: [path.relative_to(folder).as_posix() for path in paths] for split, paths in splits.items()}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("en/train-00000-of-00001", "de/train-00000-of-00001"),
        ("en/train-00000-of-00002", "de/train-00000-of-00001"),
        ("en/train/0000", "de/train/0000"),
        ("data/en/train-0", "data/de/train-0"),
        ("en-train-00000-of-00001", "de-train-00000-of-00001"),
        ("en/a", "de/a"),
    ],
)
def test_configurations_are_not_merged(tmp_path, first, second):
    touch(tmp_path, f"{first}.parquet", f"{second}.parquet")
    with pytest.raises(ValueError, match=r"there are several, .*de, .*en: give one"):
        splits_at(tmp_path)
    assert found(tmp_path, "en")["train"] == [f"{first}.parquet"]
    assert one_split(tmp_path, "de") == [tmp_path / f"{second}.parquet"]
    with pytest.raises(ValueError, match=r"there are .*de, .*en$"):
        splits_at(tmp_path, "fr")
    with pytest.raises(ValueError, match=r"of its data sets there are several.*:NAME"):
        one_split(tmp_path, None)


@pytest.mark.parametrize(
    "names",
    [
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ["a/train-00000-of-00002.parquet", "b/train-00001-of-00002.parquet"],
        ["default/train/0000.parquet", "default/train/0001.parquet"],
        ["train/data-00000-of-00001.parquet"],
        ["a.parquet", "b.parquet"],
        ["0000.parquet", "0001.parquet"],
        ["cats-0.parquet", "dogs-0.parquet"],
        ["test-0.parquet"],
        ["train_00.parquet", "train_01.parquet"],
        ["training-0.parquet"],
    ],
)
def test_files_of_one_set(tmp_path, names):
    touch(tmp_path, *names, ".cache/huggingface/train-0.parquet")
    assert found(tmp_path)["train"] == names
    assert one_split(tmp_path, None) == [tmp_path / name for name in names]


@pytest.mark.parametrize("form", ["data/{}-00000-of-00001", "{}/0000", "{}/data-00000-of-00001", "{}"])
def test_splits_beside_one_another(tmp_path, form):
    touch(tmp_path, *(f"{form.format(split)}.parquet" for split in ("train", "test")))
    assert found(tmp_path) == {split: [f"{form.format(split)}.parquet"] for split in ("test", "train")}
    with pytest.raises(ValueError, match="several splits; give one of its folders: "):
        one_split(tmp_path, None)
    assert one_split(tmp_path, "test") == [tmp_path / f"{form.format('test')}.parquet"]


def test_splits_to_hold_out_are_never_trained_on_for_want_of_another(tmp_path):
    touch(tmp_path, "validation-0.parquet", "test-0.parquet")
    assert "train" not in found(tmp_path)
