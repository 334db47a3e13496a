import csv
from pathlib import Path

import torch

from benchmarks.planted_copies import BEGIN, CHANGES, END, MEASURES, reencoded, shifted, table, write_table
from tests.helpers.image_folders import random_pixels

PAGE = Path(__file__).parents[2] / "docs" / "measures" / "planted-copies.md"


def rows():
    with PAGE.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_page_shows_what_was_measured():
    shown = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert shown == table(rows())
    found = rows()
    assert {row["measure"] for row in found} == set(MEASURES)
    assert {row["change"] for row in found} == set(CHANGES)
    cells = [line.split(" | ") for line in shown.splitlines()]
    assert len({len(line) for line in cells}) == 1
    for row in found:
        line = next(line for line in cells if line[0] == f"| {row['measure']}")
        assert f"{row['found']}/{row['planted']}" in line[1 + list(CHANGES).index(row["change"])]


def test_what_the_page_says_of_exact_copies_is_true():
    for row in rows():
        if row["change"] == "exact":
            assert row["found"] == row["planted"]


def test_writing_the_table_leaves_the_text_around_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n", encoding="utf-8")
    write_table(PAGE.with_suffix(".csv"), page)
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}{table(rows())}{END}after\n"


def test_changes():
    images = random_pixels(2)
    for x in range(8):
        expected = images[..., x - 1] if x else torch.zeros_like(images[..., 0])
        assert torch.equal(shifted(images)[..., x], expected)
    again = reencoded(images)
    assert again.shape == images.shape
    assert 0 < (again.float() - images.float()).abs().mean() < 30
    for change in CHANGES.values():
        assert change(images).dtype == torch.uint8
