"""The tables of README and docs are those of the results, and pages keep everything else."""

from pathlib import Path

import pytest

from benchmarks.mitigation.__main__ import published_tables
from benchmarks.mitigation.points import FILE, read_points, write_table
from benchmarks.mitigation.summary import equal_quality, summarize
from benchmarks.mitigation.tables import PAGES, fill, tables_of
from tests.helpers.benchmark import point

ROOT = Path(__file__).parents[2]


def tables_from(points):
    return tables_of(summarize(points), equal_quality(points))


@pytest.fixture(scope="module")
def published():
    return published_tables()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_figure_of_a_page_is_in_the_results(page, published):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert fill(text, published) == text, "renew it: python -m benchmarks.mitigation --preset uneven --report"


def test_a_page_with_another_figure_is_found_out(published):
    text = fill("a\n\n<!-- table: digits -->\n<!-- end of table -->\n\nb\n", published)
    assert text.startswith("a\n\n<!-- table: digits -->\n\n| method |")
    assert text.endswith("|\n\n<!-- end of table -->\n\nb\n")
    changed = text.replace("100 %", "99 %")
    assert changed != text
    assert fill(changed, published) == text


def test_a_table_that_there_is_not_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        fill("<!-- table: nothing -->\n<!-- end of table -->", {})


def test_a_row_shows_mean_and_interval_and_the_control_stands_below():
    points = [point("plain", seed, 1, fid=3.0 + seed, memorized=0.25 * seed) for seed in (0, 1)]
    header, rule, plain, *stopped, control, training = tables_from(points)["digits"].splitlines()
    assert header.startswith("| method | FID | memorized |")
    assert set(rule) == set("| -:")
    assert plain.startswith("| plain | 3.50 (3.00–4.00) | 12.5 % (0.0–25.0) |")
    assert len(stopped) == 2
    assert control.startswith("| *held-out images* | *0.10* | *10.0 %* |")
    assert training.startswith("| *the training images* | *3.00* |")


def test_a_row_with_a_control_of_its_own_shows_it():
    points = [point("plain", 0, 1, 3.0, 0.0), {**point("plain_with_unseen", 0, 1, 3.0, 0.0), "mq_0.15_control": 0.05}]
    row = next(line for line in tables_from(points)["digits"].splitlines() if "unseen" in line)
    assert "| 0.0 % (0.0–0.0) | 0.0 % (0.0–0.0) | 0.0 % (0.0–0.0); control 5.0 % |" in row


def test_why_a_row_is_not_compared():
    points = [point("plain", 0, 1, 10.0, 0.0), point("iet_4", 0, 1, 9.0, 0.0)]
    assert "plain training: never as good in 1 of 1 seeds" in tables_from(points)["digits equal quality"]


def test_points_of_six_digits_come_back_as_they_were_written(tmp_path):
    points = [point("plain", 0, 1, fid=3.12345, memorized=0.5), {**point("iet_4", 1, 2, 4.0, 0.0), "epsilon": 9.5}]
    write_table(points, tmp_path / FILE)
    assert read_points(tmp_path) == points


def test_without_results_it_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="Run the preset first"):
        read_points(tmp_path)
