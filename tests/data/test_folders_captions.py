import json

import pytest

from lightning_iet.data.folders import CaptionFile, read_captions


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
        ("a.json", "[1, 2]", "TypeError"),
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


def test_captions_that_no_image_wanted_are_known():
    file = CaptionFile({"1.png": "one", "2.png": "two"})
    assert file.of("1.png") == "one"
    assert file.unused == ["2.png"]


def test_the_name_itself_comes_first():
    file = CaptionFile(json.loads('{"1.png": "one", "deep/1.png": "two"}'))
    assert [file.of("1.png"), file.of("deep/1.png")] == ["one", "two"]
