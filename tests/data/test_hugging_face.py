import numpy as np
import pytest
from PIL import Image

from lightning_iet import ShardedDataModule
from lightning_iet.data import HuggingFaceDataModule
from lightning_iet.data.hugging_face import splits_at
from tests.helpers.pictures import pixels, to_bytes

datasets = pytest.importorskip("datasets", reason="needs the extra `audit`")

PIXELS = pixels(24)
LABELS = [number % 3 for number in range(24)]


def table(rows=slice(None), **columns):
    """A split; other columns than ``label`` on request."""
    columns = {"image": [Image.fromarray(image) for image in PIXELS[rows]]} | (columns or {"label": LABELS[rows]})
    types = {"image": datasets.Image()}
    types |= {name: datasets.Value("int64" if isinstance(values[0], int) else "string")
              for name, values in columns.items() if name != "image"}  # fmt: skip
    return datasets.Dataset.from_dict(columns, features=datasets.Features(types))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same data set in all forms."""
    root = tmp_path_factory.mktemp("hub")
    table().save_to_disk(root / "saved")
    splits = {"train": table(slice(18)), "test": table(slice(18, None))}
    datasets.DatasetDict(splits).save_to_disk(root / "splits")
    for name, split in splits.items():
        (root / "parquet").mkdir(exist_ok=True)
        split.to_parquet(root / "parquet" / f"{name}-00000-of-00001.parquet")
    captions = [f"caption {number}" for number in range(23)]
    table(text=[*captions, None], other=LABELS).save_to_disk(root / "captioned")
    return root


def set_up(root, **kwargs):
    data = HuggingFaceDataModule(root, **{"num_control": 3, "batch_size": 4} | kwargs)
    data.setup("fit")
    return data


@pytest.mark.parametrize("form", ["saved", "splits/train", "parquet/train-00000-of-00001.parquet"])
def test_one_split_in_every_form(folder, form):
    data = set_up(folder / form, num_control=0)
    assert len(data.train_set) == (24 if form == "saved" else 18)
    for number, (image, label, index) in enumerate(data.train_set):
        assert np.array_equal(to_bytes(image), PIXELS[number])
        assert (label, index) == (LABELS[number], number)
    assert data.num_classes == 3


@pytest.mark.parametrize("form", ["splits", "parquet"])
def test_one_split_is_trained_on_and_one_held_out(folder, form):
    data = set_up(folder / form, held_out_split="test")
    assert [len(samples) for samples in (data.train_set, data.control_set, data.reference_set)] == [18, 3, 3]
    assert np.array_equal(to_bytes(data.train_set[17][0]), PIXELS[17])
    assert len(set_up(folder / form, split="test", num_control=1).train_set) == 4
    with pytest.raises(ValueError, match=r"`split` expected one of 'test', 'train' at .* but got 'validation'"):
        set_up(folder / form, split="validation")


def test_the_split_that_is_trained_on_is_not_held_out(folder):
    with pytest.raises(ValueError, match="`held_out_split` expected another split than 'train', which is trained on"):
        set_up(folder / "splits", held_out_split="train")


def test_shards_and_workers(folder):
    data = ShardedDataModule(HuggingFaceDataModule(folder / "saved", num_control=6, batch_size=2, num_workers=1), 2)
    data.setup("fit")
    loader = data.train_dataloader()
    assert sorted(index for _, _, indices in loader for index in indices.tolist()) == list(range(12))
    for shard in loader.sampler.shards:
        assert data.train_set.targets[shard].bincount().tolist() == [2, 2, 2]


def test_captions_and_other_columns(folder):
    with pytest.raises(ValueError, match=r"with 1 of 24 that cannot: '23' \(no text\)"):
        set_up(folder / "captioned")
    data = set_up(folder / "captioned", on_error="skip", num_control=0)
    assert [caption for _, caption, _ in data.train_set] == [f"caption {number}" for number in range(23)]
    assert not hasattr(data.train_set, "targets")
    labelled = set_up(folder / "captioned", condition_column="other", image_column="image")
    assert labelled.num_classes == 3
    with pytest.raises(ValueError, match="`condition_column` expected one of 'image', 'text', 'other', but got 'x'"):
        set_up(folder / "captioned", condition_column="x")
    with pytest.raises(ValueError, match=r"`image_column` expected a column of images .* but got 'text': its columns"):
        set_up(folder / "captioned", image_column="text")


def test_files_of_the_hubs_layouts(tmp_path):
    def names(*files):
        for file in files:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return {split: [path.name for path in paths] for split, paths in splits_at(tmp_path).items()}

    assert names() == {}
    assert names("a.parquet", "b.parquet")["train"] == ["a.parquet", "b.parquet"]
    assert names("test/0000.parquet", "train/0000.parquet", "train/0001.parquet")["train"] == [
        "0000.parquet",
        "0001.parquet",
    ]


def test_a_hub_id_is_fetched_only_when_asked_for(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []

    def offline(*args, **kwargs):
        calls.append((args, kwargs))
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = "but got 'user/name', which does not exist. If it is a hub id, fetch it by `download: true`; without"
    with pytest.raises(FileNotFoundError, match=message.replace(".", r"\.")):
        set_up("user/name")
    HuggingFaceDataModule("user/name", download=True, synthetic=True).prepare_data()
    assert not calls
    data = HuggingFaceDataModule("user/name", download=True)
    for load in (data.prepare_data, lambda: data.setup("fit")):
        with pytest.raises(ConnectionError, match=r"^'user/name' could not be fetched .* the path of a local copy as"):
            load()
    assert calls == [(("user/name",), {"split": "train"})] * 2
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table())
    data = HuggingFaceDataModule("user/name", download=True, num_control=3)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_set) == 18


def test_damaged_files_are_one_line(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"expected whole files of a data set, but got .* cannot be read \("):
        set_up(tmp_path)
    with pytest.raises(ValueError, match=r"`split` expected one of 'train' at .* but got 'test'"):
        set_up(tmp_path, split="test")


def test_no_path_is_one_line():
    with pytest.raises(ValueError, match="`root` expected a path or a hub id, but got None"):
        set_up(None)


@pytest.mark.parametrize(("column", "condition"), [("caption", str), ("label", int), (None, int)])
def test_the_synthetic_twin_has_captions_where_the_column_has(column, condition):
    data = set_up("user/name", condition_column=column, synthetic=True)
    assert type(data.train_set[0][1]) is condition


def test_of_several_captions_in_a_row_the_first_is_taken(tmp_path):
    captions = [["a", "b", "c"]] * 22 + [["", "second"], []]
    columns = {"image": [Image.fromarray(image) for image in PIXELS], "text": captions}
    features = {"image": datasets.Image(), "text": datasets.Sequence(datasets.Value("string"))}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"with 1 of 24 that cannot: '23' \(no text\)"):
        set_up(tmp_path / "a.parquet")
    data = set_up(tmp_path / "a.parquet", on_error="skip", num_control=0)
    assert [caption for _, caption, _ in data.train_set] == ["a"] * 22 + ["second"]
    batch = next(iter(set_up(tmp_path / "a.parquet", on_error="skip", batch_size=3).train_dataloader()))
    assert batch[1] == ["a"] * 3 or "second" in batch[1]


def test_several_labels_in_a_row_are_refused(tmp_path):
    columns = {"image": [Image.fromarray(image) for image in PIXELS], "label": [[1, 2]] * 24}
    features = {"image": datasets.Image(), "label": datasets.Sequence(datasets.Value("int64"))}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"`condition_column` expected integers, texts.* in 'label', but got others"):
        set_up(tmp_path / "a.parquet")


def test_labels_that_are_words_are_classes_in_order_of_name(tmp_path):
    table(label=[["dog", "cat", "emu"][n % 3] for n in range(24)]).to_parquet(tmp_path / "a.parquet")
    data = set_up(tmp_path / "a.parquet", num_control=0)
    assert data.classes == ["cat", "dog", "emu"]
    assert data.num_classes == 3
    assert [label for _, label, _ in data.train_set] == [[1, 0, 2][n % 3] for n in range(24)]


def test_configurations_side_by_side_are_not_merged(tmp_path):
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        table(text=[name] * 24).to_parquet(tmp_path / name / "train-00000-of-00001.parquet")
    with pytest.raises(
        ValueError, match=r"^Argument `configuration` expected one of .* got None: there are several, de, en"
    ):
        set_up(tmp_path)
    data = set_up(tmp_path, configuration="de", num_control=0)
    assert {caption for _, caption, _ in data.train_set} == {"de"}
    with pytest.raises(ValueError, match="but got 'fr': there are de, en"):
        set_up(tmp_path, configuration="fr")


def test_columns_that_are_not_used_are_named(folder, caplog):
    set_up(folder / "captioned", on_error="skip")
    assert "columns 'image' and 'text' are used; left alone: 'other'" in caplog.text
