"""`lightning-iet inspect`: what it finds of planted near-duplicates, what it writes, and what it advises."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.transforms.functional import to_pil_image

from lightning_iet.audit.reading import image_set
from lightning_iet.data.duplicates import repeat_images
from lightning_iet.tools.inspect import inspect, inspect_images


@pytest.fixture(scope="module")
def digits():
    pixels, _ = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[:120] / 16


def uint8(images):
    return (255 * images).round().to(torch.uint8)


@pytest.mark.usefixtures("drawn")
def test_planted_near_duplicates_are_listed_counted_and_drawn(digits, tmp_path, capsys):
    images, source = repeat_images(digits, repeated=2, repeats=6)
    found = inspect_images(image_set(uint8(images), location="train"), tmp_path)
    with (tmp_path / "duplicates.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    for image in (0, 1):
        planted = [str(i) for i in (source == image).nonzero().flatten().tolist()]
        (group,) = {line["group"] for line in lines if line["name"] in planted}
        assert [line["name"] for line in lines if line["group"] == group] == planted
        assert [line["kept_by_drop"] for line in lines if line["group"] == group] == ["1"] + ["0"] * 5
    assert found.duplicates["0.33"]["largest"] == 6
    assert found.advice.startswith("Uneven")
    assert (tmp_path / "duplicates.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "inspection.json").read_text())
    assert written["kind"] == "inspection"
    assert written["images"] == len(images)
    assert "--data.duplicates drop" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("repeats", [[2], [2, 3], [12], [2] * 10, [12] * 10])
def test_the_picture_names_every_image_and_its_title_is_whole(digits, tmp_path, monkeypatch, repeats):
    figures = []
    monkeypatch.setattr("lightning_iet.tools.inspect.save_figure", lambda figure, path: figures.append(figure))
    copies = [digits[i : i + 1] for i, number in enumerate(repeats) for _ in range(number - 1)]
    images = uint8(torch.cat([digits, *copies]))
    names = [f"a_long_folder_of_digits/{i:04}$.png" if i % 2 else f"short/{i}.png" for i in range(len(images))]
    inspect_images(replace(image_set(images, location="train"), names=names), tmp_path, ratio=0.01)
    (figure,) = figures
    captions = [axes.get_title() for axes in figure.axes if axes.get_title()]
    with (tmp_path / "duplicates.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    groups = [
        [line["name"] for line in lines if line["group"] == str(group)][:8] for group in range(min(8, len(repeats)))
    ]
    shown = [name.rpartition("/")[2] if len(name) > 20 else name for group in groups for name in group]
    assert captions == [name.replace("$", r"\$") for name in shown]
    figure.draw_without_rendering()
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0
    assert title.x1 <= figure.bbox.x1
    told = figure._suptitle.get_text()
    assert ("the 8 largest of 10 groups" in told) == (len(repeats) > 8)
    assert ("(the largest has 12)" in told.replace("\n", " ")) == (12 in repeats)


def test_looser_thresholds_find_at_least_as_much(digits, tmp_path):
    images, _ = repeat_images(digits, repeated=3, repeats=4)
    counts = inspect_images(image_set(uint8(images), location="train"), tmp_path).duplicates
    assert [counts[key]["images"] for key in sorted(counts)] == sorted(count["images"] for count in counts.values())


def test_a_set_without_duplicates_gets_no_picture_of_them(tmp_path, capsys):
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "duplicates.png").write_bytes(b"of an earlier inspection")
    found = inspect_images(image_set(uint8(images), location="train"), tmp_path)
    assert found.duplicates["0.33"] == {"groups": 0, "images": 0, "largest": 1}
    assert not (tmp_path / "duplicates.png").exists()
    assert found.advice.startswith("Even, but few")
    assert f"Written to {tmp_path}: duplicates.csv, inspection.json\n" in capsys.readouterr().out


def test_the_row_of_the_given_threshold_is_its_own(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_iet.tools.inspect._write", lambda *_: None)
    pixels = image_set(uint8(digits), location="train")
    both = inspect_images(pixels, tmp_path, ratio=0.446).duplicates
    assert list(both) == ["0.20", "0.33", "0.45"]
    monkeypatch.setattr("lightning_iet.tools.inspect.RATIOS", ())
    given, usual = (inspect_images(pixels, tmp_path, ratio=ratio).duplicates["0.45"] for ratio in (0.446, 0.45))
    assert given != usual  # else the example tells nothing
    assert both["0.45"] == given


def test_an_image_unlike_all_others_is_named(tmp_path, capsys):
    images = 0.5 + 0.05 * torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[7] = torch.eye(8)
    names = [f"cat [old {i}]" for i in range(50)]
    found = inspect_images(replace(image_set(uint8(images.clamp(0, 1)), location="train"), names=names), tmp_path)
    assert found.outliers == ["cat [old 7]"]
    assert "1 image unlike all others: cat [old 7]\n" in capsys.readouterr().out


def test_a_folder_of_images_is_read(digits, tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for number, image in enumerate(digits[:20]):
        to_pil_image(image).save(folder / f"{number:02d}.png")
    to_pil_image(digits[3]).save(folder / "again.png")
    found = inspect(folder, out=tmp_path / "inspection")
    assert (found.images, found.size) == (21, (1, 8, 8))
    with (tmp_path / "inspection" / "duplicates.csv").open(newline="") as stream:
        assert {"03.png", "again.png"} <= {line["name"].rpartition("/")[2] for line in csv.DictReader(stream)}


@pytest.mark.parametrize(
    ("options", "argument"), [({"ratio": 0.0}, "ratio"), ({"k": 0}, "k"), ({"image_size": 0}, "image_size")]
)
def test_settings_out_of_range_are_refused(options, argument, tmp_path):
    with pytest.raises(ValueError, match=f"Argument `{argument}` expected"):
        inspect(tmp_path, out=tmp_path / "out", **options)


def test_two_images_are_too_few(tmp_path):
    with pytest.raises(ValueError, match="Argument `train` expected at least three images, but got 2"):
        inspect_images(image_set(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), location="train"), tmp_path)
