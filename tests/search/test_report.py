"""What a search says: sentences, rows, and the page."""

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from math import log10

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.stats import t as student

from lightning_iet.search import Candidate, Objective, Point, SelectionSearch
from lightning_iet.search.report import (
    effect_rows,
    effects,
    front_rows,
    front_table,
    interval,
    render_page,
    verdict,
    write_search,
)
from lightning_iet.search.selection_points import write_points

pytestmark = pytest.mark.usefixtures("drawn")

GROUPS = ("down", "up", "rest")
OBJECTIVES = (Objective("fid"), Objective("copies", minus_control=True))


def point(name, mask, values, *, kind="mask", step=100, rate=1e-4, last=True, **options):
    control = {"fid_control": 1.0, "copies_control": 0.02, "copies_control_standard_error": 0.01}
    figures = {"fid": values[0], "copies": values[1] + 0.02, **control}
    return Point(Candidate(name, kind, mask, rate), 0, step, values, figures, last=last, **options)


def found(points, references=(), **options):
    return SelectionSearch(
        groups=GROUPS, objectives=OBJECTIVES, points=tuple(points), references=tuple(references), **options
    )


MASKS = (
    point("trial-000", "111", (2.0, 0.30), trained=30, share=0.3),
    point("trial-001", "100", (4.0, 0.005), trained=10, share=0.1),
    point("trial-002", "010", (5.0, 0.0), trained=10, share=0.1),
    point("trial-003", "110", (6.0, 0.2), trained=20, share=0.2),
)


def words(search):
    said = verdict(search)
    return " ".join([said.headline, *said.details])


def test_the_best_quality_within_the_control_is_chosen():
    search = found(MASKS)
    assert search.choice[0] is MASKS[1]  # 0.005 is within one standard error; trial-002 is no better
    assert "memorizes no more than held-out images show" in verdict(search).headline
    assert "trial-001 at step 100: fid 4, copies beyond control 0.005; 10 parameters train (10 %" in words(search)


def test_the_rule_names_a_standard_error_only_where_one_is_known():
    assert "as much as held-out images and one standard error." in words(found(MASKS))
    bare = [
        replace(p, figures={name: value for name, value in p.figures.items() if not name.endswith("error")})
        for p in MASKS
    ]
    assert found(bare).choice[0] is bare[2]  # 0.005 is beyond the control now
    assert "memorize at most as much as held-out images." in words(found(bare))
    both = SelectionSearch(
        groups=GROUPS,
        objectives=(*OBJECTIVES, Objective("distance", minus_control=True)),
        points=tuple(replace(p, values=(*p.values, 0.0)) for p in MASKS),
    )
    assert "held-out images and one standard error of copies beyond control." in words(both)


def test_where_all_memorize_it_is_the_knee():
    points = [
        point("a", "111", (0.0, 1.0)), point("b", "100", (0.2, 0.3)), point("c", "010", (1.0, 0.1)),
    ]  # fmt: skip
    search = found(points)
    assert search.choice[0] is points[1]
    assert "every mask memorizes" in verdict(search).headline
    bare = SelectionSearch(
        groups=GROUPS,
        objectives=(Objective("fid"), Objective("copies")),
        points=tuple(Point(p.candidate, 0, 1, p.values, {}) for p in points),
    )
    assert bare.limits == (None,)
    assert "measured no control" in words(bare)


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        ((3.0, 0.5), "Stopped at this fid or better, plain fine-tuning memorizes more than the mask: copies"),
        ((3.9, 0.001), "plain fine-tuning memorizes no more than the mask: copies beyond control 0.001"),
        ((3.9, 0.005), "plain fine-tuning memorizes no more than the mask"),
        ((4.1, 0.0), "No checkpoint of plain fine-tuning reaches this fid."),
    ],
)
def test_a_choice_is_compared_with_stopping_in_time(plain, expected):
    early = point("plain-0", "", plain, kind="plain", step=50, last=False)
    late = point("plain-0", "", (2.5, 0.9), kind="plain", step=100)
    references = [early, late] if plain[0] <= 4 else [early]
    said = words(found(MASKS, references))
    assert expected in said
    assert ("(plain-0 at step 50)" in said) == ("No checkpoint of plain" not in said)
    assert "the whole family memorizes more than the mask: copies beyond control 0.3 (trial-000 at step 100)" in said


def test_an_objective_that_never_differed_is_named():
    quiet = [point(name, mask, (fid, 0.0)) for name, mask, fid in (("a", "111", 2.0), ("b", "100", 4.0))]
    search = found(quiet, [point("plain-0", "", (1.0, 0.0), kind="plain")])
    assert verdict(search).headline == "Chosen: 3 of 3 groups at learning rate 0.0001, by fid alone: no trial memorized"
    first, *_ = verdict(search).details
    assert first.startswith("copies beyond control was 0 at every checkpoint of every trial")
    assert "membership_inference_auc" in first
    loud = found(quiet, [point("plain-0", "", (1.0, 0.3), kind="plain")])  # the masks do what they are there for
    assert "which memorizes no more than held-out images show" in verdict(loud).headline
    assert "every checkpoint" not in words(loud)
    assert "Every mask has copies beyond control 0, unlike plain fine-tuning" in words(loud)
    assert "Every mask" not in words(search)
    assert "every checkpoint" not in words(found(quiet[:1]))
    alike = found([point(name, mask, (2.0, copies)) for name, mask, copies in (("a", "111", 0.1), ("b", "100", 0.2))])
    assert "fid was 2 at every checkpoint of every trial" in words(alike)


def test_a_search_without_points_says_so():
    search = found([], failures={"trial-000": "no memory"})
    assert search.choice is None
    assert "No mask was trained" in verdict(search).headline


def test_rows_of_the_front_and_of_what_it_is_compared_with():
    plain = [point("plain-0", "", (3.0, 0.5), kind="plain", step=s, last=s == 100) for s in (50, 100)]
    pretrained = point("pretrained-1", "", (9.0, 0.0), kind="pretrained", step=0, rate=0.0)
    header, *rows = front_rows(found(MASKS, [*plain, pretrained]))
    assert header == ["", "trial", "trains", "learning rate", "step", "share", "fid", "copies beyond control"]
    assert [row[:3] for row in rows] == [
        ["front", "trial-000", "111"], ["chosen", "trial-001", "100"], ["front", "trial-002", "010"],
        ["reference", "plain-0", "all parameters"], ["reference", "pretrained-1", "nothing"],
    ]  # fmt: skip
    assert rows[1][3:] == ["1.00e-04", "100", "10 %", "4", "0.005"]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(front_table(found(MASKS, [*plain, pretrained])))
    assert "trial-001" in console.export_text()


def test_the_table_fits_a_terminal_and_cuts_no_name():
    mask = "01" * 12
    search = found([point("trial-100", mask, (2.0, 0.3), trained=30, share=0.000123), *MASKS])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(front_table(search))
    said = console.export_text()
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said
    assert "trial-100" in said
    assert "0.0123 %" in said
    assert said.count("0101") >= 4  # the mask, over some lines


def test_effects_are_least_squares_over_the_last_points():
    generator = np.random.default_rng(0)
    masks = generator.integers(0, 2, (30, 3))
    masks[:, 0] |= ~masks.any(1)  # one that trains nothing is the pretrained network
    rates = 10 ** generator.uniform(-5, -3, 30)
    fid = 5 - masks @ [2.0, 0.5, 0.0] + 0.2 * np.log10(rates) ** 2 + 0.1 * generator.normal(size=30)
    points = []
    for number, (mask, rate, value) in enumerate(zip(masks, rates, fid, strict=True)):
        name = f"trial-{number:03d}"
        bits = "".join(map(str, mask))
        points.append(point(name, bits, (99.0, 9.0), step=50, rate=float(rate), last=False))
        points.append(point(name, bits, (float(value), 0.1 * float(mask[0])), rate=float(rate)))
    points.append(point("copy", "000", (50.0, 5.0), copied_from="trial-000"))
    search = found(points, sizes=(10, 20, 1))
    logs = np.array([log10(rate) for rate in rates])
    design = np.column_stack([np.ones(30), masks, logs, logs**2])
    expected, residual, _, _ = np.linalg.lstsq(design, fid, rcond=None)
    errors = np.sqrt(residual[0] / 24 * np.diag(np.linalg.inv(design.T @ design)))
    part = effects(search)["fid"]
    np.testing.assert_allclose(part.effect, expected[1:4], rtol=1e-6)
    np.testing.assert_allclose(part.standard_error, errors[1:4], rtol=1e-6)
    np.testing.assert_allclose(interval(part), student.ppf(0.975, 24) * errors[1:4], rtol=1e-6)
    header, first, *_ = effect_rows(search)
    assert header == ["group", "parameters", "effect on fid", "effect on copies beyond control"]
    assert first[:2] == ["down", "10"]
    assert first[2] == f"{expected[1]:+.3g} ± {errors[1]:.2g}"


class Reader(HTMLParser):
    """Checks that elements are closed, and collects text and what is referred to."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}  # noqa: RUF012

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.links, self.tags, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(page):
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    return reader


def test_the_page_is_complete_in_itself():
    search = found(MASKS, [point("plain-0", "", (3.0, 0.5), kind="plain")], settings={"steps": 300, "seed": 0})
    page = render_page(search)
    reader = read(page)
    assert all(link.startswith("#") for link in reader.links)
    assert "script" not in reader.tags
    assert reader.tags.count("svg") == 2  # the front, and the effects
    assert "default-src 'none'" in page
    for text in ("trial-001 (chosen)", "steps", "300", "Held-out images: fid 1", "What these figures do not show"):
        assert text in reader.text
    anchors = {link[1:] for link in reader.links}
    assert anchors - set(re.findall(r'id="([^"]+)"', page)) == set()


def test_every_colour_is_there_by_day_and_by_night():
    page = render_page(found(MASKS))
    used = set(re.findall(r"var\((--[a-z]+)\)", page))
    parts = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)
    blocks = [shared + own for shared, own in zip(parts[:3], parts[3:], strict=True)]  # of all pages, and of this one
    assert len(blocks) == 3  # light, dark, print
    for block in blocks:
        assert used - set(re.findall(r"(--[a-z]+):", block)) <= {"--focus"}
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert set(re.findall(r"#[0-9a-f]{6}", svg)) == set()  # a colour of the day would be wrong by night


def test_names_are_text_whatever_they_hold():
    names = ("<b>&amp;", 'up"onload=x', "rest")
    search = SelectionSearch(
        groups=names,
        objectives=OBJECTIVES,
        points=MASKS + tuple(point(f"t{n}", m, (3.0 + n, 0.1)) for n, m in enumerate(("001", "011", "101"))),
        failures={"trial-009": "ValueError: <script>alert(1)</script>"},
    )
    reader = read(render_page(search))
    assert "b" not in reader.tags
    assert "script" not in reader.tags
    assert names[0] in reader.text
    assert "<script>alert(1)</script>" in reader.text


def test_three_objectives_make_two_pictures(tmp_path):
    objectives = (*OBJECTIVES, Objective("distance", maximize=True))
    points = tuple(
        Point(p.candidate, 0, 1, (*p.values, 1 - p.values[1]), {**p.figures, "distance": 1.0}) for p in MASKS
    )
    search = SelectionSearch(groups=GROUPS, objectives=objectives, points=points)
    assert read(render_page(search)).tags.count("svg") >= 2
    write_search(search, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"front.png", "front-2.png"}


def test_files_of_a_search(tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "99.json").write_text("of an earlier state of the search")
    write_search(found(MASKS), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chosen.json", "front.png", "masks", "points.csv", "report.html",
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["01.json", "02.json", "03.json"]
    chosen = json.loads((tmp_path / "chosen.json").read_text())
    assert chosen["mask"] == {"down": 1, "up": 0, "rest": 0}
    assert chosen["source"]["rule"] == "control"
    assert chosen["source"]["objectives"] == {"fid": 4.0, "copies beyond control": 0.005}
    with Image.open(tmp_path / "front.png") as picture:
        picture.load()
        assert picture.size[0] > 600


def test_a_figure_that_is_called_like_a_column_does_not_take_its_place(tmp_path):
    given = point("a", "111", (2.0, 0.1), trained=30, share=0.3)
    write_points(found([replace(given, figures={**given.figures, "share": 9.0, "loss": 0.5})]), tmp_path / "points.csv")
    with (tmp_path / "points.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["share"], row["loss"], row["fid"]) == ("0.3", "0.5", "2.0")
