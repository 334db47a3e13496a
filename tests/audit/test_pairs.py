import hashlib
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lightning_iet.audit import Settings, audit_images, image_set, make_findings
from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.evidence import weigh, without_pairs
from lightning_iet.audit.features import build_features
from lightning_iet.audit.pairs import Review, apply_review, image_hash, pair_rows, read_review
from lightning_iet.audit.reading import read_images
from lightning_iet.audit.report.page import render_page
from lightning_iet.audit.verdict import verdict
from lightning_iet.data.sources import open_source
from lightning_iet.functional.copy_tests import Scan, combined_p_values
from tests.helpers.image_folders import random_pixels, random_set


@pytest.fixture
def audited(tmp_path):
    train = random_set(60)
    pixels = torch.cat([train.pixels[:2], (train.pixels[5:6].float() * 0.9).to(torch.uint8), random_pixels(40, seed=3)])
    sets = {"generated": image_set(pixels, location="g"), "train": train, "held_out": random_set(50, seed=4)}
    cache = BlockCache(tmp_path / "cache")
    return audit_images(**sets, features=build_features("pixels"), cache=cache, settings=Settings(k=20))


def test_rows_are_those_of_a_table(audited):
    pandas = pytest.importorskip("pandas")
    rows = pair_rows(audited)
    table = pandas.DataFrame(rows)
    assert list(table["named"]) == [1] * 3 + [0] * 40
    assert list(table["source_index"][:3]) == [0, 1, 5]
    limits = dict(zip(audited.copies["generated"].matches, audited.evidence.noticed_below.tolist(), strict=True))
    parts = table["score"] / table["search"].map(limits)
    assert parts.iloc[3:].round(6).is_monotonic_increasing
    assert make_findings(audited).pairs == rows


def test_where_the_scan_decides_the_images_that_it_counts_are_first(audited):
    """By the ratio of the scan's search, whatever the other searches say of them."""
    copies, none = audited.copies["generated"], torch.zeros(43, dtype=torch.bool)
    ratios = torch.rand(43, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.3
    shown = replace(copies, search_ratios=ratios, search=(ratios[:, 1] > 0.5).long())
    scan = Scan(threshold=float(ratios[:, 1].sort().values[9]), generated=10, held_out=0, p_value=0.001)
    evidence = replace(audited.evidence, sure=none, discovered=none, scan=scan, scan_search=1)
    rows = pair_rows(replace(audited, copies={"generated": shown}, evidence=evidence))
    order = [row["index"] for row in rows]
    assert order[:10] == ratios[:, 1].argsort()[:10].tolist()
    assert sorted(order) == list(range(43))
    limits = dict(zip(copies.matches, evidence.noticed_below.tolist(), strict=True))
    rest = [(not row["noticed"], row["score"] / limits[row["search"]]) for row in rows[10:]]
    assert rest == sorted(rest)


def test_a_review_is_kept_and_counts(audited, tmp_path):
    rows = pair_rows(audited)
    decisions = [(rows[0], "dismissed"), (rows[5], "confirmed")]
    pairs = [row | {"decision": decision} for row, decision in decisions]
    (tmp_path / "review.json").write_text(json.dumps({"kind": "review", "pairs": pairs}))
    reviewed = apply_review(audited, read_review(tmp_path / "review.json"))
    changed = (reviewed.evidence.named != audited.evidence.named).nonzero().flatten().tolist()
    assert sorted(changed) == sorted([rows[0]["index"], rows[5]["index"]])
    assert not reviewed.evidence.noticed[rows[0]["index"]]
    assert reviewed.evidence.noticed[rows[5]["index"]]
    findings = make_findings(reviewed)
    assert "3 of 43 generated images" in verdict(findings).answer
    assert "1 confirmed, and 1 dismissed" in verdict(findings).details
    assert (findings.evidence.confirmed, findings.evidence.dismissed) == (1, 1)


def beside_another(audit, image, *, noticed):
    """Let one search find another training image of an image than the one that it is shown beside."""
    copies, other = audit.copies["generated"], 1 - int(audit.copies["generated"].search[image])
    sources, ratios = copies.search_sources.clone(), copies.search_ratios.clone()
    sources[image, other], ratios[image, other] = 40, 0.01 if noticed else 0.9
    changed = replace(copies, search_sources=sources, search_ratios=ratios)
    pair = image_hash(audit.sets["generated"], image), image_hash(audit.sets["train"], 40)
    return replace(audit, copies=dict(audit.copies) | {"generated": changed}), other, pair


def test_a_confirmed_copy_is_one_whatever_search_it_is_shown_by(audited):
    """As where held-out images make another search the most telling one: the image is shown by one that finds it."""
    image = pair_rows(audited)[10]["index"]
    audit, other, pair = beside_another(audited, image, noticed=False)
    reviewed = apply_review(audit, Review(confirmed=frozenset({pair})))
    assert (reviewed.evidence.confirmed, reviewed.unused_decisions) == (1, 0)
    assert reviewed.evidence.named[image]
    assert int(reviewed.copies["generated"].search[image]) == int(reviewed.evidence.search[image]) == other
    row = next(row for row in pair_rows(reviewed) if row["index"] == image)
    assert (row["sha256"], row["source_sha256"]) == pair


def test_a_dismissed_pair_says_nothing_of_another_in_which_the_image_is_named(audited):
    image = pair_rows(audited)[0]["index"]
    audit, _, pair = beside_another(audited, image, noticed=True)
    reviewed = apply_review(audit, Review(dismissed=frozenset({pair})))
    assert reviewed.evidence.named[image]
    assert int(reviewed.evidence.dismissed.sum()) == 0
    assert (reviewed.unused_decisions, reviewed.outweighed_decisions) == (0, 1)
    row = pair_rows(audit)[0]
    shown = row["sha256"], row["source_sha256"]
    reviewed = apply_review(audit, Review(dismissed=frozenset({pair, shown})))
    assert not reviewed.evidence.named[image]
    assert int(reviewed.evidence.dismissed.sum()) == 1
    assert (reviewed.unused_decisions, reviewed.outweighed_decisions) == (0, 0)
    confirmed = apply_review(audit, Review(dismissed=frozenset({pair}), confirmed=frozenset({shown})))
    assert (confirmed.unused_decisions, confirmed.outweighed_decisions) == (0, 0)
    strange = apply_review(audit, Review(dismissed=frozenset({pair, ("of another", "audit")})))
    assert (strange.unused_decisions, strange.outweighed_decisions) == (1, 1)


def test_only_the_shown_pair_dismissed(audited):
    """Another search notices the image beside a training image that nobody has judged: it is shown by that one."""
    image = pair_rows(audited)[0]["index"]
    audit, other, pair = beside_another(audited, image, noticed=True)
    row = pair_rows(audit)[0]
    assert (row["index"], row["source_index"]) == (image, image)
    reviewed = apply_review(audit, Review(dismissed=frozenset({(row["sha256"], row["source_sha256"])})))
    assert reviewed.evidence.noticed[image]
    assert not reviewed.evidence.dismissed[image]
    assert int(reviewed.copies["generated"].search[image]) == int(reviewed.evidence.search[image]) == other
    row = next(row for row in pair_rows(reviewed) if row["index"] == image)
    assert (row["sha256"], row["source_sha256"]) == pair
    assert row["score"] == pytest.approx(0.01)
    others = torch.arange(43) != image
    for name in ("sure", "discovered", "noticed", "beyond", "search"):
        before, after = (getattr(found.evidence, name) for found in (audit, reviewed))
        assert torch.equal(before[others], after[others])


def test_a_name_that_one_search_gives_outlasts_the_pair_of_another(copying):
    """Without the dismissed ratio the fit of that search differs, and a held-out image would be as unlikely."""
    generator = torch.Generator().manual_seed(2)
    sets = {
        "generated": torch.tensor([[0.28, 0.31]]).repeat(60, 1),
        "held_out": 0.3 + 0.7 * torch.rand(60, 2, generator=generator),
    }
    unlike = {"search_noise": torch.full((60, 2), torch.nan), "identical": torch.zeros(60, dtype=torch.bool)}
    generated, held_out = (
        replace(copying.copies[name], search_ratios=ratios, **unlike) for name, ratios in sets.items()
    )
    evidence = weigh(generated, held_out, level=0.05)
    assert not evidence.sure.any()
    assert evidence.discovered.all()
    assert evidence.beyond.all()
    others = torch.arange(60) > 0
    for search, stays in ((1, True), (0, False)):
        dismissed = torch.zeros(60, 2, dtype=torch.bool)
        dismissed[0, search] = True
        if stays:  # though its rank by what is left is a worse one
            left = generated.search_ratios.masked_fill(dismissed, 1.0)
            assert combined_p_values(left, held_out.search_ratios).p_values[0] > 1 / 61
        found = without_pairs(evidence, generated, held_out, dismissed)
        assert bool(found.discovered[0]) == bool(found.beyond[0]) == stays
        assert found.discovered[others].all()
        assert found.beyond[others].all()


def test_an_image_that_the_scan_counts_stays_where_another_pair_of_it_was_dismissed(copying):
    """It is neither named nor noticed, and the pair that it is shown in is not judged."""
    none = torch.zeros(60, dtype=torch.bool)
    search = torch.full((60,), copying.evidence.scan_search)
    evidence = replace(copying.evidence, sure=none, discovered=none, noticed=none, search=search)
    copies = dict(copying.copies) | {"generated": replace(copying.copies["generated"], search=search)}
    audit, _, pair = beside_another(replace(copying, copies=copies, evidence=evidence), 3, noticed=False)
    reviewed = apply_review(audit, Review(dismissed=frozenset({pair})))
    assert reviewed.evidence.scan == audit.evidence.scan
    assert not reviewed.evidence.dismissed.any()
    assert {row["index"] for row in pair_rows(reviewed)[:20]} == set(range(20))


def test_the_page_holds_earlier_decisions_also_of_pairs_that_it_does_not_show(audited, tmp_path):
    """What is saved there with what is new takes the earlier file's place."""
    rows = pair_rows(audited)
    decided = [(rows[0], "dismissed"), (rows[30], "confirmed")]
    keys = ("name", "sha256", "source", "source_sha256")
    pairs = [{key: row[key] for key in keys} | {"decision": decision} for row, decision in decided]
    pairs.append({"sha256": "of another", "source_sha256": "audit", "decision": "dismissed"})
    (tmp_path / "review.json").write_text(json.dumps({"kind": "review", "pairs": pairs}))
    reviewed = apply_review(audited, read_review(tmp_path / "review.json"))
    page = render_page(reviewed, make_findings(reviewed), pairs=3, images=False)
    data = json.loads(page.split('<script id="data" type="application/json">')[1].split("</script>")[0])
    pairs[2] |= {"name": "", "source": ""}
    assert sorted(data["decisions"], key=lambda pair: pair["sha256"]) == sorted(pairs, key=lambda pair: pair["sha256"])
    (tmp_path / "again.json").write_text(json.dumps({"kind": "review", "pairs": data["decisions"]}))
    assert read_review(tmp_path / "again.json").as_list() == reviewed.review.as_list()
    assert reviewed.unused_decisions == 1


def test_what_a_person_has_decided_is_no_measurement(audited):
    """Dismissed images are in no list of copies, and confirmed ones are no sure copies by their pixels."""
    rows = pair_rows(audited)
    dismissed, confirmed = (frozenset({(row["sha256"], row["source_sha256"])}) for row in (rows[0], rows[5]))
    findings = make_findings(apply_review(audited, Review(dismissed=dismissed, confirmed=confirmed)))
    before = make_findings(audited)
    assert rows[0]["copy"]
    listed = {name for image in findings.most_copied for name in image.copies}
    assert listed == {name for image in before.most_copied for name in image.copies} - {rows[0]["name"]} | {
        rows[5]["name"]
    }
    assert findings.originals == before.originals
    sure = before.evidence.sure - 1
    assert (findings.evidence.sure, findings.evidence.sure_by_review) == (sure + 1, 1)
    page = render_page(
        apply_review(audited, Review(dismissed=dismissed, confirmed=confirmed)), findings, pairs=0, images=False
    )
    assert f"{sure} are sure copies: equal to a training image" in page
    assert "1 more are copies since a person has confirmed them (--review)." in page


def test_all_dismissed(audited):
    named = [row for row in pair_rows(audited) if row["noticed"]]
    dismissed = frozenset((row["sha256"], row["source_sha256"]) for row in named)
    words = verdict(make_findings(apply_review(audited, Review(dismissed=dismissed))))
    assert words.level != "copies"


@pytest.fixture
def copying(tmp_path):
    """20 of 60 generated images are copies, by the scan as well."""
    train = random_set(60)
    pixels = torch.cat([(train.pixels[:20].float() * 0.9).to(torch.uint8), random_pixels(40, seed=3)])
    sets = {"generated": image_set(pixels, location="g"), "train": train, "held_out": random_set(60, seed=4)}
    cache = BlockCache(tmp_path / "cache")
    return audit_images(**sets, features=build_features("pixels"), cache=cache, settings=Settings(k=20))


def decide(audit, count):
    rows = pair_rows(audit)[:count]
    return apply_review(audit, Review(dismissed=frozenset((row["sha256"], row["source_sha256"]) for row in rows)))


def test_pairs_that_were_dismissed_do_not_count_in_the_scan(copying):
    assert copying.evidence.scan.p_value < 1e-6
    assert copying.evidence.scan.generated == 20
    reviewed = decide(copying, 20)
    assert reviewed.evidence.scan.p_value > 0.01
    words = verdict(make_findings(reviewed))
    assert words.level != "copies"
    assert "0 confirmed, and 20 dismissed" in words.details


def test_a_review_is_told_of_where_the_scan_decides(copying):
    """Of 20 images that the scan counts, 5 are dismissed; none is named one by one."""
    none = torch.zeros(60, dtype=torch.bool)
    evidence = replace(copying.evidence, sure=none, discovered=none)
    reviewed = decide(replace(copying, evidence=evidence), 5)
    assert reviewed.evidence.scan.generated == 15
    words = verdict(make_findings(reviewed))
    assert words.answer.startswith("The generator copies: 15 of 60 generated images lie nearer")
    assert "0 confirmed, and 5 dismissed" in words.details
    assert not reviewed.evidence.dismissed[[row["index"] for row in pair_rows(reviewed)[:15]]].any()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pairs": [{}]}', '{"pairs": 5}', "\x00"])
def test_files_that_are_no_review(tmp_path, content):
    (tmp_path / "review.json").write_text(content)
    with pytest.raises(ValueError, match=r"^Argument `review` expected a file that was saved .* something else"):
        read_review(tmp_path / "review.json")


def test_a_decision_that_is_none(tmp_path):
    pair = {"sha256": "a", "source_sha256": "b", "decision": "perhaps"}
    (tmp_path / "review.json").write_text(json.dumps({"pairs": [pair]}))
    with pytest.raises(ValueError, match="with a decision 'perhaps'"):
        read_review(tmp_path / "review.json")
    with pytest.raises(FileNotFoundError, match=r"^Argument `review` expected .* does not exist"):
        read_review(tmp_path / "nowhere.json")


def test_the_hash_of_an_image_is_that_of_its_file_or_of_its_pixels():
    images = random_set(3)
    assert image_hash(images, 1) != image_hash(images, 2)
    assert image_hash(images, 1) == image_hash(random_set(3), 1)
    stored = replace(images, hashes=[hashlib.sha256(bytes([n])).hexdigest() for n in range(3)])
    assert image_hash(stored, 2) == hashlib.sha256(b"\x02").hexdigest()


def test_a_decision_on_a_page_holds_for_that_page_alone(audited, tmp_path):
    """All pages of a stack have one file's bytes."""
    stacks = {}
    for name in ("generated", "train"):
        first, *rest = (Image.fromarray(page[0].numpy()) for page in audited.sets[name].pixels)
        (tmp_path / name).mkdir()
        first.save(tmp_path / name / "a.tif", save_all=True, append_images=rest)
        source = open_source(tmp_path / name, argument=name)
        stacks[name] = read_images(source, BlockCache(tmp_path / "read"), argument=name, location=name)
        assert torch.equal(stacks[name].pixels, audited.sets[name].pixels)
    stored = replace(audited, sets=dict(audited.sets) | stacks)
    reviewed = decide(stored, 1)
    assert reviewed.evidence.dismissed.nonzero().flatten().tolist() == [pair_rows(stored)[0]["index"]]
