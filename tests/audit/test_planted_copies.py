import csv
from pathlib import Path

import pytest
import torch

from benchmarks.planted_copies import (
    BEGIN,
    CHANGES,
    END,
    FASHION_MNIST,
    INNOCENTS,
    WITHOUT,
    near_duplicates,
    read,
    row,
    table,
    write_figure,
    write_table,
)
from tests.helpers.image_folders import random_pixels

KINDS = ["exact", "mirrored"]


@pytest.fixture
def measured(tmp_path):
    """A CSV file with figures of two methods and two kinds."""
    rows = [
        row(method, kind, torch.tensor([0, 1, 2, found]))
        for method, found in (("audit", 3), ("pixels", -1))
        for kind in KINDS
    ]
    rows += [row(method, INNOCENTS, torch.tensor([-1, 5, -1])) for method in ("audit", "pixels")]
    rows += [
        {"method": "audit", "change": f"{WITHOUT} {verdict}", "planted": 0, "images": 200, "found": found}
        for verdict, found in (("copies", 1), ("open", 7))
    ]
    path = tmp_path / "measured.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["set", *rows[0]])
        writer.writeheader()
        writer.writerows({"set": "photographs"} | figures for figures in rows)
    return path


def test_copies_of_the_right_image_count():
    assert row("audit", "exact", torch.tensor([0, 2, -1, 3])) == {
        "method": "audit", "change": "exact", "planted": 4, "images": 4, "found": 2,
    }  # fmt: skip
    assert row("audit", INNOCENTS, torch.tensor([0, 2, -1, 3]))["found"] == 3


def test_the_table_has_a_line_for_each_kind_and_a_column_for_each_method(measured):
    lines = table(read(measured)).splitlines()
    assert "| exact | 4 of 4 | 3 of 4 |" in lines
    assert f"| **{INNOCENTS}** | 1 of 3 | 1 of 3 |" in lines
    assert "Of 200 audits of photographs without copies, 1 spoke of copies, and 7 were *not decided*." in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_writing_the_table_leaves_the_text_around_it(measured, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n", encoding="utf-8")
    write_table(measured, page)
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}{table(read(measured))}{END}after\n"


def test_a_figure_is_drawn(measured, tmp_path):
    write_figure(measured, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", CHANGES)
def test_changes_change_images_and_keep_their_form(name):
    images = random_pixels(2, size=32).expand(-1, 3, -1, -1).clone()
    images[:, 0] //= 2
    changed = CHANGES[name](images)
    assert (changed.shape, changed.dtype) == (images.shape, images.dtype)
    assert torch.equal(changed, images) == (name == "exact")


def test_the_page_shows_what_was_measured():
    page = Path(__file__).parents[2] / "docs" / "measures" / "planted-copies.md"
    measured = read(page.with_suffix(".csv"))
    assert page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0] == table(measured)
    assert {row["change"] for row in measured if row["set"] == "photographs" and int(row["planted"])} == set(CHANGES)
    for figures in measured:
        if figures["change"] == "exact":
            assert figures["found"] == figures["planted"]
        if (figures["method"], figures["change"]) == ("audit", f"{WITHOUT} copies"):
            assert int(figures["found"]) <= 0.05 * int(figures["images"])  # as promised


@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="Fashion-MNIST is not installed")
def test_audits_beside_near_duplicates(tmp_path):
    levels = near_duplicates(3, tmp_path)
    assert levels.total() == 3
    assert not levels["copies"]
