import base64
import csv
import hashlib
import json
import re
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

from lightning_iet.audit import Settings, audit_images, image_set, make_findings
from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.comparability import Difference
from lightning_iet.audit.features import build_features
from lightning_iet.audit.pairs import for_spreadsheets
from lightning_iet.audit.report import write_report
from lightning_iet.audit.report.page import parts_of_limits, render_page
from lightning_iet.data.samples import Skip
from lightning_iet.evaluation.membership import infer_membership
from lightning_iet.evaluation.memorization import below
from lightning_iet.utilities.files import printable
from tests.helpers.image_folders import NASTY, random_pixels
from tests.helpers.phantoms import eight_bits, phantoms
from tests.helpers.undrawn import drawing


class Page(HTMLParser):
    """Elements with their attributes, and the text of those that are looked for."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("wbr", "img", "input", "meta", "br"):  # these have no end
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="session")
def report(audited, membership, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    findings = make_findings(audited, settings={"image_size": None}, membership=membership)
    with drawing():
        write_report(audited, findings, folder, pairs=20)
    return folder


@pytest.fixture(scope="session")
def page(report):
    return Page((report / "report.html").read_text(encoding="utf-8"))


def test_the_folder_holds_what_is_promised(report):
    names = {"report.html", "pairs.csv", "metrics.json", "pairs.png", "ratios.png"}
    assert {file.name for file in report.iterdir()} == names
    for picture in ("pairs.png", "ratios.png"):
        with Image.open(report / picture) as image:
            assert min(image.size) > 400


@pytest.mark.usefixtures("drawn")
def test_pictures_and_page_name_the_same_numbers(report, audited, monkeypatch, tmp_path):
    figures = {}
    saved = "lightning_iet.audit.report.page.save_figure"
    monkeypatch.setattr(saved, lambda figure, path: figures.update({path.name: figure}))
    write_report(audited, make_findings(audited), tmp_path, pairs=20)
    html = (report / "report.html").read_text(encoding="utf-8")
    on_page = re.findall(r'<span class="short">(.*?)</span> <strong class="value">(.*?)</strong>', html)
    titles = [axes.get_title() for axes in figures["pairs.png"].axes if axes.get_title()]
    assert titles == [f"{label} = {value}" for label, value in on_page[:16]]
    assert titles[0].startswith("ratio ÷ limit = ")
    with (report / "pairs.csv").open(newline="", encoding="utf-8") as file:
        order = [int(row["index"]) for row in csv.DictReader(file)]
    parts = parts_of_limits(audited, audited.copies["generated"])[order[:16]]
    assert [float(title.rpartition(" ")[2]) for title in titles] == pytest.approx(parts.tolist(), abs=5e-4)
    ratios = figures["ratios.png"]
    assert "Left of the dashed line it is noticed" in " ".join(ratios._suptitle.get_text().split())
    for figure in figures.values():
        figure.draw_without_rendering()
        for text in [figure._suptitle, *(axes.xaxis.label for axes in figure.axes)]:
            box = text.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.x1


def test_no_line_breaks_within_an_option(audited):
    difference = Difference("sharpness", 1.0, 2.0, 1.0, 0.1, "Bring all images to one size with --image-size.")
    findings = replace(make_findings(audited), differences=[difference])
    html = render_page(audited, findings, pairs=0)
    assert html.count('with <span class="option">--image-size</span>.') == html.count("one size with ") > 0


def test_metrics_are_plain_json(report, audited):
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["generated"]["copies"]["total"] == 74
    assert metrics["generated"]["copies"]["count"] == int(
        below(audited.copies["generated"].ratios["distinct"], 1 / 3).sum()
    )
    assert metrics["sets"]["generated"]["found"] == 75
    assert metrics["sets"]["generated"]["used"] == 74
    assert metrics["sets"]["generated"]["skipped"] == [
        {"name": printable(f"broken {NASTY}"), "reason": "the file is empty"}
    ]
    assert metrics["sets"]["train"]["sha256"] == audited.sets["train"].sha256
    assert metrics["most_copied"][0] == {"name": "5", "index": 5, "count": 2, "copies": ["1.png", "2.png"]}
    assert metrics["duplicates"]["groups"] == [["3", "40"]]


def test_the_table_of_pairs_has_every_generated_image(report, audited):
    with (report / "pairs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    copies = audited.copies["generated"]
    assert len(rows) == 74
    assert sorted(int(row["index"]) for row in rows) == list(range(74))
    limits = dict(zip(copies.matches, audited.evidence.noticed_below.tolist(), strict=True))
    parts = [round(float(row["score"]) / limits[row["search"]], 6) for row in rows]
    marks = [[-int(row[name]) for name in ("named", "noticed", "beyond_held_out")] for row in rows]
    order = [[*own, part] for own, part in zip(marks, parts, strict=True)]
    assert order == sorted(order)  # what is named, then the nearest by the limit of its search, first
    names, train = audited.sets["generated"].names, audited.sets["train"].names
    for row in rows:
        i = int(row["index"])
        assert row["name"] == for_spreadsheets(names[i])
        assert float(row["score"]) == pytest.approx(float(copies.scores[i]), rel=1e-6)
        assert row["source"] == for_spreadsheets(train[int(row["source_index"])])
        assert int(row["source_index"]) == copies.sources[i]
        assert (int(row["named"]), int(row["noticed"])) == (audited.evidence.named[i], audited.evidence.noticed[i])
        assert int(row["beyond_held_out"]) == audited.evidence.beyond[i]
        for j in range(5):
            assert int(row[f"train_index_{j + 1}"]) == copies.neighbors.indices[i, j]
            expected = float(copies.neighbors.sq_distances[i, j]) ** 0.5
            assert float(row[f"distance_{j + 1}"]) == pytest.approx(expected, rel=1e-6)
        for name, ratios in copies.ratios.items():
            assert float(row[f"ratio_{name}"]) == pytest.approx(float(ratios[i]), rel=1e-6)
        assert int(row["identical"]) == (i < 4)
        assert int(row["copy"]) == bool(copies.ratios["distinct"][i] < 1 / 3)


def test_the_page_marks_what_is_nearer_than_any_held_out_image(page, audited):
    cards = [attributes for attributes in page.all("li") if "data-beyond" in attributes]
    marked = {int(card["data-index"]) for card in cards if card["data-beyond"] == "1"}
    shown = {int(card["data-index"]) for card in cards}
    beyond = set(audited.evidence.beyond.nonzero().flatten().tolist())
    assert beyond
    assert marked == beyond & shown
    words = [text for text in page.texts["p"] if text == "nearer than any of 50 held-out images"]
    assert len(words) == len(marked)


def test_names_are_escaped_everywhere(report, page):
    text = (report / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "\\xff" in text
    assert len(page.all("script")) == 2
    shown = printable(NASTY)
    assert shown in "".join(page.texts["span"])  # with places to break it in between
    assert any(shown in attributes["alt"] for attributes in page.all("img"))
    assert any(shown in attributes.get("data-names", "") for attributes in page.all("li"))


def test_nothing_is_loaded_and_only_our_script_may_run(report, page):
    text = (report / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert not page.all("link")
    assert all(attributes["src"].startswith("data:image/") for attributes in page.all("img"))
    assert not any(
        "style" in attributes or any(name.startswith("on") for name in attributes) for _, attributes in page.elements
    )
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        own = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(own) == 1
        digest = base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_counts_for_every_stop_of_the_slider_are_those_of_all_images(page, audited):
    data = json.loads(next(text for text in page.texts["script"] if text.startswith("{")))
    assert len(data["stops"]["score"]) == 151
    assert 101 <= len(data["stops"]["nearest"]) <= 102
    assert data["stops"]["score"][data["defaults"]["score"]] == 1
    noticed = data["sets"]["generated"]["below"]["score"][data["defaults"]["score"]]
    assert noticed == int(audited.evidence.noticed.sum())
    for name, copies in audited.copies.items():
        assert data["sets"][name]["total"] == len(copies.identical)
        for measure, ratios in {"score": parts_of_limits(audited, copies), **copies.ratios}.items():
            for stop, count in zip(data["stops"][measure], data["sets"][name]["below"][measure], strict=True):
                limit = torch.tensor(stop)
                assert count == sum(bool(ratio < limit) for ratio in ratios)


def test_the_share_of_the_control_is_that_of_the_images_judged(audited):
    findings = make_findings(audited)
    evidence = replace(findings.evidence, held_out_alike=2, held_out_judged=40)

    def counts(evidence):
        text = render_page(audited, replace(findings, evidence=evidence), pairs=0)
        return re.findall(r'<td class="count">([^<]*)<', text), "and of held-out images that are as near" in text

    named = findings.evidence.named
    assert counts(evidence) == ([f"{named.count} of 74", "2 of 40"], True)
    assert counts(replace(evidence, held_out_judged=0)) == ([f"{named.count} of 74"], False)


@pytest.mark.parametrize("sure", [0, 1])
def test_the_page_marks_no_copies_by_a_control_that_is_none(tmp_path, sure):
    """Held-out images far darker than all others: what only they would name is no copy, on the page and in the rows."""
    train = image_set(random_pixels(80), location="train")
    noise = torch.randint(-50, 51, (20, 1, 8, 8), generator=torch.Generator().manual_seed(4))
    rough = (train.pixels[:20].int() + noise).clamp(0, 255).to(torch.uint8)
    drawn = torch.cat([train.pixels[60 : 60 + sure], rough, random_pixels(60, seed=1)])
    sets = {"generated": image_set(drawn, location="g"), "train": train}
    held_out = image_set(random_pixels(100, seed=2) // 8, location="h")
    options = {"cache": BlockCache(tmp_path / "cache"), "settings": Settings(k=20)}
    audit = audit_images(**sets, held_out=held_out, features=build_features("pixels"), **options)
    findings = make_findings(audit)
    named = findings.evidence.named.count
    assert named > sure == findings.evidence.sure
    assert [row["index"] for row in findings.pairs if row["named"]] == [0] * sure
    assert findings.verdict.level == ("copies" if sure else "open")
    page = render_page(audit, findings, pairs=100)
    assert page.count('<span class="named">copy</span>') == sure
    assert f'"named": {sure}' in page
    assert ("Share of images named as copies" in page) == bool(sure)
    assert "A threshold judges each image alone" not in page
    assert f"<td>{named - sure}</td>" in page


def test_the_page_says_why_two_counts_differ(report, audited):
    text = (report / "report.html").read_text(encoding="utf-8")
    data = json.loads(next(part for part in Page(text).texts["script"] if part.startswith("{")))
    named = int(audited.evidence.named.sum())
    assert data["named"] == named
    assert f"A threshold judges each image alone; the {named} named as copies were judged together" in text


def test_everything_has_a_name_for_a_screen_reader(page):
    assert all(attributes["alt"].strip() for attributes in page.all("img"))
    assert page.all("html")[0]["lang"] == "en"
    assert [len(page.all(tag)) for tag in ("main", "header", "nav", "footer", "h1")] == [1] * 5
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    labelled = [a[key] for _, a in page.elements for key in ("aria-labelledby", "aria-describedby", "for") if key in a]
    assert set(labelled) <= ids
    assert {a["href"][1:] for a in page.all("a")} <= ids
    assert all("aria-label" in a or a.get("aria-hidden") == "true" for a in page.all("svg"))


def test_thumbnails_are_the_images(page, audited):
    small = audited.sets["train"].pixels.shape[-1] == 8
    sources = [attributes["src"] for attributes in page.all("img")]
    encoded = base64.b64decode(sources[0].split(",")[1])
    with Image.open(BytesIO(encoded)) as image:
        assert image.format == ("PNG" if small else "JPEG")
        assert max(image.size) <= 160
        if small:
            shown = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(8, 8, 3).permute(2, 0, 1)
            assert any(torch.equal(shown, pixels) for pixels in audited.sets["generated"].pixels[:4])


def test_the_curve_of_the_gap(page, membership):
    paths = {a["class"]: a["d"] for a in page.all("path") if a.get("class") in ("line", "band")}
    zero = next(float(a["y1"]) for a in page.all("line") if a.get("class") == "zero")
    line, band = (
        [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", paths[name])] for name in ("line", "band")
    )
    assert len(line) == 4
    assert len(band) == 8
    unit = [gap.gap / gap.held_out / (zero - y) for gap, (_, y) in zip(membership.timesteps, line, strict=True)]
    assert unit == pytest.approx([unit[0]] * 4, rel=0.02)  # heights are shares of the held-out loss
    for (x, high), (_, y), (same, low) in zip(band[:4], line, band[:3:-1], strict=True):
        assert x == same
        assert high < y < low  # upwards, numbers of SVG fall
    steps = [b[0] - a[0] for a, b in pairwise(line)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)


def test_one_timestep_is_a_point(small_audit):
    one = infer_membership(torch.rand(5, 1), torch.rand(5, 1), torch.tensor([500]))
    assert 'class="line"' in render_page(small_audit, make_findings(small_audit, membership=one), pairs=100)


def test_without_images_the_page_has_names_and_figures_only(audited, membership, tmp_path):
    findings = make_findings(audited, membership=membership, title="Ward 7", command="lightning-iet audit")
    write_report(audited, findings, tmp_path, pairs=20, images=False)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "data:image" not in text
    assert not Page(text).all("img")
    assert "Ward 7" in text
    assert "lightning-iet audit" in text
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "pairs.csv", "metrics.json", "ratios.png"}


def test_all_that_could_not_be_read_is_counted_though_not_listed(small_audit):
    skipped = [Skip(f"{number}.png", "cut off") for number in range(1234)]
    train = replace(small_audit.sets["train"], skipped=skipped)
    audited = replace(small_audit, sets=small_audit.sets | {"train": train})
    text = render_page(audited, make_findings(audited), pairs=0, images=False)
    assert "1,234 could not be read" in text
    assert "… and 1034 more" in text


def test_the_record_says_what_was_found_and_how(report, audited):
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["kind"] == "audit"
    assert metrics["verdict"]["level"] == "copies"
    assert metrics["verdict"]["headline"].startswith("The generator copies:")
    assert datetime.fromisoformat(metrics["date"]).tzinfo is not None
    assert metrics["evidence"]["named"]["count"] == int(audited.evidence.named.sum())
    kinds = [part["kind"] for part in metrics["planted"]]
    assert kinds[:3] == ["exact", "mirrored", "recoloured"]
    assert ("moved" in kinds) == (not metrics["not_moved"])
    assert metrics["sets"]["train"]["repeated"] == 1


def test_membership_is_silent_where_losses_were_not_measured(small_audit):
    text = render_page(small_audit, make_findings(small_audit), pairs=100)
    assert "loss" not in text.partition("<body>")[2]


def test_no_pairs_and_no_duplicates(small_audit, tmp_path):
    bare = replace(small_audit, duplicates=None, copies={"generated": small_audit.copies["generated"]})
    write_report(bare, make_findings(bare), tmp_path, pairs=0)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No pairs were asked for" in text
    assert "They were not looked for" in text
    assert "no held-out images to compare with" in text


def test_degraded_copies_have_their_rows(tmp_path):
    """They are looked for in images of 16 pixels, but not in those of the other tests, which are of 8."""
    train = eight_bits(phantoms(60, size=16))
    pixels = torch.cat([eight_bits(gaussian_blur(phantoms(60, size=16)[:6], [5, 5], [0.8, 0.8])), train[6:8]])
    generated = torch.cat([pixels, eight_bits(phantoms(20, size=16, seed=1))])
    held_out = eight_bits(phantoms(60, size=16, seed=2))
    sets = [image_set(images, location=name) for images, name in ((generated, "g"), (train, "t"), (held_out, "h"))]
    cache = BlockCache(tmp_path / "cache")
    audit = audit_images(*sets, features=build_features("pixels"), cache=cache, settings=Settings(moved=False))
    findings = make_findings(audit)
    write_report(audit, findings, tmp_path, pairs=28)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [part.kind for part in findings.planted] == ["exact", "mirrored", "recoloured", "degraded"]
    cells = page.texts["td"] + page.texts["th"]
    for part in findings.planted:
        assert part.kind in cells
        assert f"{part.found:,} of {part.planted:,}" in cells
    with (tmp_path / "pairs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    searches = [row["search"] for row in rows if not int(row["identical"])]
    assert searches.count("degraded") > 0
    remarks = " ".join(page.texts["span"] + page.texts["p"])
    assert remarks.count("blurred or noisy") == searches.count("degraded")
