import json
import unicodedata

import pytest

from lightning_iet.data.captions import CaptionFile, read_captions


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"file_name": "a.png", "text": "a dog"}\n\n{"file_name": "b/c.png", "text": "a cat "}\n'),
        ("a.jsonl", '{"image": "a.png", "caption": "a dog"}\n{"path": "b/c.png", "prompt": ["a cat", "x"]}'),
        ("a.json", '{"a.png": ["a dog", "dog"], "b/c.png": ["a cat"]}'),
        ("a.json", '{"a.png": "a dog", "b/c.png": "a cat", "none.png": [], "empty.png": " ", "null.png": null}'),
        ("a.json", '[{"file": "a.png", "captions": ["a dog"]}, {"file_name": "b/c.png", "text": "a cat"}]'),
    ],
)
def test_every_form_is_read(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_captions(tmp_path / name) == {"a.png": "a dog", "b/c.png": "a cat"}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", "", "Expecting value"),
        ("a.jsonl", '{"file_name": "a.png"', "delimiter"),
        ("a.json", "[1, 2]", "AttributeError"),
        ("a.json", "3", "TypeError"),
        ("a.json", '{"a.png": 3}', "a caption is int, not text"),
        ("a.jsonl", '{"text": "a dog"}', "an entry has none of file_name, image, file, path"),
        ("a.json", b"\xff\xfe", "codec"),
    ],
)
def test_other_files_are_one_line(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"^Argument `captions` expected .* but got '.*{name}', .*{reason}") as error:
        read_captions(tmp_path / name)
    assert "\n" not in str(error.value)


def test_names_of_another_machine_are_matched_by_their_end():
    file = CaptionFile({"/a/train/x/1.png": "one", "/a/train/y/1.png": "two", "/a/train/2.png": "three"})
    assert [file.of(name) for name in ("x/1.png", "y/1.png", "2.png")] == ["one", "two", "three"]
    assert file.unused == []
    assert file.of("1.png") is None  # two names end so
    assert file.of("z/2.png") is None


def test_the_caption_of_an_image_is_no_other_ones():
    file = CaptionFile({"a/1.png": "of a"}, ["1.png", "a/1.png", "b/2.png"])
    assert (file.of("1.png"), file.of("a/1.png")) == (None, "of a")


def test_captions_that_no_image_wanted_are_known():
    file = CaptionFile({"1.png": "one", "2.png": "two"})
    assert file.of("1.png") == "one"
    assert file.unused == ["2.png"]


def test_the_name_itself_comes_first():
    file = CaptionFile(json.loads('{"1.png": "one", "deep/1.png": "two"}'))
    assert [file.of("1.png"), file.of("deep/1.png")] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "file_name,text\na.png,a dog\nb/c.png,a cat\n"),
        ("a.csv", "\ufefffile_name;caption\na.png;a dog\nb/c.png;a cat\n"),
        ("a.csv", 'image,caption\na.png,a dog\na.png,another\nb/c.png,"a cat"\n'),
        ("a.tsv", "file_name\ttext\na.png\ta dog\nb/c.png\ta cat\n"),
        ("captions.txt", "image|caption\na.png|a dog\nb/c.png|a cat\n"),
        ("a.jsonl", '{"file_name": "a.png", "text": "a dog"}\n{"file_name": "a.png", "text": "another"}\n'
                    '{"file_name": "b/c.png", "text": ["", "a cat"]}'),
        ("a.json", '{"a.png": {"caption": "a dog", "tags": "x"}, "b/c.png": {"caption": "a cat"}}'),
        ("a.json", '{"images": [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b/c.png"}], "annotations":'
                   '[{"image_id": 9, "caption": "a cat"}, {"image_id": 7, "caption": "a dog"},'
                   '{"image_id": 7, "caption": "x"}]}'),
    ],
)  # fmt: skip
def test_tables_and_several_captions(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_captions(tmp_path / name) == {"a.png": "a dog", "b/c.png": "a cat"}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e"])
def test_a_row_of_a_table_ends_where_its_line_does(tmp_path, separator):
    (tmp_path / "a.csv").write_text(f"file_name,text\r\na.png,a{separator}dog\r\nb.png,a cat\r\n", encoding="utf-8")
    assert read_captions(tmp_path / "a.csv") == {"a.png": f"a{separator}dog", "b.png": "a cat"}


def test_captions_in_parquet(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra `audit`")
    rows = {"file_name": ["a.png", "b.png"], "text": [["a dog", "dog"], ["a cat"]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "metadata.parquet")
    assert read_captions(tmp_path / "metadata.parquet") == {"a.png": "a dog", "b.png": "a cat"}
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="which is something else"):
        read_captions(tmp_path / "metadata.parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_caption_under_another_key_is_asked_for(tmp_path, name):
    rows = {
        "a.jsonl": '{"file_name": "a.png", "blip_caption": "a dog"}',
        "a.csv": "file_name,blip_caption\na.png,a dog",
    }
    (tmp_path / name).write_text(rows[name])
    with pytest.raises(ValueError, match=r"have file_name, blip_caption, and none of text.*`caption_key`"):
        read_captions(tmp_path / name)
    assert read_captions(tmp_path / name, key="blip_caption") == {"a.png": "a dog"}


@pytest.mark.parametrize("listed", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_accents_in_either_form(listed, stored):
    names = [unicodedata.normalize(form, "café/é_1.png") for form in (listed, stored)]
    file = CaptionFile({names[0]: "coffee"})
    assert file.of(names[1]) == "coffee"
    assert not file.unused


@pytest.mark.parametrize(
    "listed", ["cats\\1.png", ".\\cats\\1.png", "C:\\data\\cats\\1.png", "./cats/1.png", "cats/1.png"]
)
def test_paths_of_windows(listed):
    assert CaptionFile({listed: "one", "dogs\\1.png": "two"}).of("cats/1.png") == "one"


def test_names_that_differ_in_nothing_but_their_form_are_not_confused():
    file = CaptionFile({"a\\1.png": "one", "a/1.png": "two"})
    assert file.of("a/1.png") == "two"
    assert CaptionFile({"a\\1.png": "one", "./a/1.png": "two"}).of("a/1.png") is None
