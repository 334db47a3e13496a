from types import SimpleNamespace

import pytest
import torch

from benchmarks.planted_copies import simulated
from lightning_iet.audit.evidence import discover, scan_searches, telling_searches, weigh, without_control
from lightning_iet.functional.copy_tests import (
    combined_p_values,
    false_discoveries,
    noticeable_below,
    scan_test,
)
from tests.helpers.conformal import conformal_p_values

SEARCHES = ("plain", "recoloured", "degraded", "moved")


def copies(scores, *, search=None, distances=None, noise=None, **changes):
    """What searches might have found: by the recoloured search, unless it is said otherwise."""
    scores = torch.tensor(scores)
    count = len(scores)
    chosen = (torch.ones(count, dtype=torch.int64) if search is None else search)[:, None]
    distances = 0.4 * scores if distances is None else distances
    noise = torch.where(scores < 0.1, 40.0, 20.0) if noise is None else noise
    ratios = torch.ones(count, 4).scatter(1, chosen, scores[:, None])
    found = {
        "matches": dict.fromkeys(SEARCHES),
        "search_ratios": ratios,
        "search_distances": torch.full((count, 4), 0.3).scatter(1, chosen, distances[:, None]),
        "search_noise": torch.full((count, 4), torch.nan).scatter(1, chosen, noise[:, None]),
        "search_sources": torch.zeros(count, 4, dtype=torch.int64),
        "identical": torch.zeros(count, dtype=torch.bool),
        "blank": torch.zeros(count, dtype=torch.bool),
        "variance": torch.full((count,), 1000.0),
        "content": torch.arange(count),
    }
    return SimpleNamespace(scores=scores, **found | changes)


def several(ratios, **changes):
    """What several searches might have found, no copy of it a sure one."""
    unlike = {
        "matches": dict.fromkeys(SEARCHES[: ratios.shape[1]]),
        "search_distances": torch.ones_like(ratios),
        "search_noise": torch.full_like(ratios, torch.nan),
        "search_sources": torch.zeros(ratios.shape, dtype=torch.int64),
    }
    return copies(ratios.amin(dim=1).tolist(), search_ratios=ratios, **unlike | changes)


def innocent(count, low=0.56, seed=0):
    return (low + (1 - low) * torch.rand(count, generator=torch.Generator().manual_seed(seed))).tolist()


def test_six_copies_among_900_are_named_though_ranks_cannot_name_them():
    """The case of row 6: ratios of 0.03, and all of 1,000 held-out images above 0.56."""
    evidence = weigh(copies([0.03] * 6 + innocent(894)), copies(innocent(1000, seed=1)), level=0.05)
    assert evidence.named.nonzero().flatten().tolist() == list(range(6))
    assert not evidence.discovered.any()
    assert evidence.scan.p_value > 0.01  # six of 1,900 are too few for a test of ranks
    assert evidence.noticed[:6].all()
    assert evidence.beyond[:6].all()


def test_copies_that_are_not_sure_are_noticed():
    """Where the difference is larger, as of a JPEG of low quality, they are not named, but never passed over."""
    evidence = weigh(copies([0.2] * 6 + innocent(894)), copies(innocent(1000, seed=1)), level=0.05)
    assert not evidence.named.any()
    assert evidence.noticed.nonzero().flatten().tolist() == list(range(6))


def test_many_copies_are_discovered_by_ranks():
    generated, held_out = copies([0.2] * 30 + innocent(870)), copies(innocent(1000, seed=1))
    evidence = weigh(generated, held_out, level=0.05)
    expected = false_discoveries(conformal_p_values(generated.scores, held_out.scores)) & (generated.scores <= 0.5)
    assert torch.equal(evidence.discovered, expected)
    assert int(evidence.discovered.sum()) == 30
    assert evidence.scan == scan_test(generated.scores, held_out.scores, largest=0.5)  # one search alone has any
    assert evidence.scan_search == 1
    assert evidence.scan.p_value < 1e-6


def test_a_search_in_which_innocent_images_come_near_hides_no_copies_of_another():
    """As in photographs, where registration finds smooth patches alike: the lowest ratio of all tells nothing apart."""
    torch.manual_seed(0)

    def found(count):
        ratios = torch.stack([0.6 + 0.4 * torch.rand(count), torch.ones(count), torch.rand(count) ** (1 / 3)], dim=1)
        return several(ratios)

    held_out, generated = found(400), found(220)
    generated.search_ratios[:20, 0] = 0.25
    generated.scores = generated.search_ratios.amin(dim=1)
    by_lowest = false_discoveries(conformal_p_values(generated.scores, held_out.scores))
    assert not by_lowest.any()  # held-out images have lower ones by registration
    evidence = weigh(generated, held_out, level=0.05)
    assert evidence.discovered[:20].all()


def by_searches(count, *, seed):
    torch.manual_seed(seed)
    ratios = torch.rand(count, 3) ** (1 / torch.tensor([12.0, 4.0, 1.0]))
    return several(ratios)


def test_what_is_noticed_is_what_the_tail_of_each_search_says():
    generated, held_out = by_searches(50, seed=0), by_searches(200, seed=1)
    generated.search_ratios[:2, 0] = 0.3  # seldom so low in this search, often in the last
    evidence = weigh(generated, held_out, level=0.05)
    expected = [min(0.5, noticeable_below(part, 50, level=0.05 / 3)) for part in held_out.search_ratios.T]
    assert evidence.noticed_below.tolist() == pytest.approx(expected)
    lower = [[ratio < limit for ratio, limit in zip(row, expected, strict=True)] for row in generated.search_ratios]
    assert evidence.noticed.tolist() == [any(row) for row in lower]
    assert evidence.noticed[:2].all()
    assert not (generated.scores[:2] < noticeable_below(held_out.scores, 50)).any()


def test_the_scan_is_that_of_the_clearest_search_times_their_number():
    generated, held_out = by_searches(100, seed=2), by_searches(100, seed=3)
    generated.search_ratios[:12, 1] = 0.1
    evidence = weigh(generated, held_out, level=0.05)
    scans = [
        scan_test(*pair, largest=0.5) for pair in zip(generated.search_ratios.T, held_out.search_ratios.T, strict=True)
    ]
    pooled = torch.cat([generated.search_ratios, held_out.search_ratios])
    low = int((pooled <= 0.5).any(dim=0).sum())
    assert evidence.scan_search == 1
    assert evidence.scan[:3] == scans[1][:3]
    assert evidence.scan.p_value == pytest.approx(low * scans[1].p_value)
    assert (
        evidence.scan.p_value < 0.01 < scan_test(generated.search_ratios.amin(1), held_out.scores, largest=0.5).p_value
    )


def test_scans_of_innocent_images_seldom_speak_of_copies():
    """At most one of a hundred audits; of 200, at most 6 at 99.5 %, but more without the allowance."""
    alone = together = 0
    for seed in range(200):
        ratios = torch.rand(40, 4, generator=torch.Generator().manual_seed(seed)) ** 0.5  # a quarter is below 0.5
        found, _ = scan_searches(ratios[:20], ratios[20:])
        together += found.p_value < 0.01
        alone += found.p_value / 4 < 0.01
    assert together <= 6 < alone


def test_a_generator_nearer_in_the_bulk_is_no_copier():
    """Blurred images may lie nearer to everything; above a score of 0.5 that says nothing of copies."""
    generated = copies(innocent(500, low=0.55))
    evidence = weigh(generated, copies(innocent(500, low=0.8, seed=1)), level=0.05)
    assert not evidence.named.any()
    assert evidence.scan.p_value == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, True),
        ({"noise": torch.full((1,), 30.0)}, False),  # too unlike
        ({"blank": torch.ones(1, dtype=torch.bool)}, False),  # one colour
        ({"distances": torch.full((1,), 0.2)}, False),  # not three times nearer than held-out images
        ({"noise": torch.full((1,), torch.nan), "identical": torch.ones(1, dtype=torch.bool)}, True),
        ({"noise": torch.full((1,), 36.0), "variance": torch.full((1,), 163.0)}, False),  # 16.33: a tenth of its own
        ({"noise": torch.full((1,), 36.0), "variance": torch.full((1,), 164.0)}, True),
        ({"identical": torch.ones(1, dtype=torch.bool), "variance": torch.full((1,), 0.1)}, True),
    ],
)
def test_what_makes_a_copy_a_sure_one(changes, named):
    held_out = copies(innocent(30, seed=1))
    evidence = weigh(copies([0.01], **changes), held_out, level=0.05)
    assert bool(evidence.sure) == named


def test_identical_images_are_not_sure_if_held_out_images_are_identical_too():
    identical = torch.ones(1, dtype=torch.bool)
    held_out = copies([0.0, *innocent(30)], identical=torch.tensor([True] + [False] * 30))
    evidence = weigh(copies([0.0], identical=identical), held_out, level=0.05)
    assert not evidence.named.any()
    assert evidence.noticed_below[1] == 0


def test_equal_images_say_as_much_as_one_of_them():
    """One innocent image that is drawn 50 times, by chance nearer than any held-out image, makes no copier."""
    held_out, other = innocent(100, seed=1), innocent(49)
    once, often = copies([0.45, *other]), copies([0.45] * 50 + other, content=torch.tensor([7] * 50 + [*range(8, 57)]))
    plain, found = (weigh(images, copies(held_out), level=0.05) for images in (once, often))
    assert found.scan == plain.scan == scan_test(once.scores, torch.tensor(held_out), largest=0.5)
    assert torch.equal(found.noticed_below, plain.noticed_below)
    assert not found.named.any()
    assert (int(found.judged.sum()), found.held_out_judged) == (50, 100)
    assert found.beyond.tolist() == [True] * 50 + [False] * 49
    assert weigh(copies([0.45] * 50 + other), copies(held_out), level=0.05).scan.p_value < 1e-6  # all of them different


def test_what_the_tests_name_are_all_that_equal_it():
    """Copies are named by the ranks of different images; each that was drawn twice is named twice."""
    generated, held_out = copies([0.2] * 30 + innocent(30)), copies(innocent(100, seed=1))
    expected = weigh(generated, held_out, level=0.05)
    assert int(expected.discovered.sum()) == 30
    twice = torch.arange(60).repeat(2)
    found = weigh(copies(generated.scores[twice].tolist(), content=twice), held_out, level=0.05)
    for name in ("discovered", "noticed", "beyond", "search"):
        assert torch.equal(getattr(found, name), getattr(expected, name)[twice])
    assert found.scan == expected.scan


def test_equal_held_out_images_are_one_control():
    """Ninety-one times the same one: only ten say what chance gives."""
    held_out = copies([0.9] * 91 + innocent(9, seed=1), content=torch.tensor([0] * 91 + [*range(1, 10)]))
    generated = copies([0.3] * 6 + innocent(54))
    found = weigh(generated, held_out, level=0.05)
    assert found.scan == weigh(generated, copies(held_out.scores[90:].tolist()), level=0.05).scan
    assert found.held_out_judged == 10
    assert not found.discovered.any()


def test_images_of_one_colour_are_neither_copies_nor_a_control():
    """As black slices at the ends of volumes, which lie in every part of the data."""
    identical = torch.tensor([False] * 3 + [True] * 20 + [False] * 97)
    blank = torch.arange(120) < 3
    scores = [0.0] * 23 + innocent(97)
    control = {"distances": torch.tensor([0.0] * 2 + [0.4] * 100), "identical": torch.arange(102) < 2}
    held_out = copies([0.0] * 2 + innocent(100, seed=1), blank=torch.arange(102) < 2, **control)
    generated = copies(scores, identical=identical | blank, blank=blank, content=torch.arange(120).clamp(min=2))
    found = weigh(generated, held_out, level=0.05)
    assert found.named.nonzero().flatten().tolist() == list(range(3, 23))
    assert found.noticed.nonzero().flatten().tolist() == list(range(3, 23))
    others = weigh(copies(scores[3:], identical=identical[3:]), copies(held_out.scores[2:].tolist()), level=0.05)
    assert found.scan == others.scan
    assert torch.equal(found.noticed_below, others.noticed_below)


@pytest.mark.parametrize("score", [0.01, 0.3])
def test_a_control_of_one_colour_is_none(score):
    generated = copies([score] * 3 + innocent(20), content=torch.tensor([*range(20), 0, 0, 0]))
    blank = copies([0.0] * 20, blank=torch.ones(20, dtype=torch.bool), content=torch.zeros(20, dtype=torch.int64))
    found, expected = weigh(generated, blank, level=0.05), weigh(generated, None, level=0.05)
    assert (found.scan, found.held_out_judged) == (None, 0)
    for name in ("sure", "discovered", "noticed", "noticed_below", "search"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_a_generator_of_one_colour_alone_is_not_judged():
    blank = copies([0.0] * 5, blank=torch.ones(5, dtype=torch.bool), content=torch.arange(5))
    found = weigh(blank, copies(innocent(30)), level=0.05)
    assert not (found.named | found.noticed | found.beyond).any()
    assert found.scan.p_value == 1


@pytest.mark.parametrize(
    ("score", "distance", "search", "named", "noticed"),
    [
        (0.01, 0.01, 1, True, True),
        (0.01, 0.2, 1, False, True),  # nearer than the next, but not near
        (0.01, 3.0, 0, True, True),  # plain distances have no scale
        (0.3, 0.05, 3, False, True),
        (0.4, 0.05, 3, False, False),
        (0.2, 0.05, 2, False, False),  # at 8 x 8 pixels many are near
    ],
)
def test_without_held_out_images(score, distance, search, named, noticed):
    found = copies([score], distances=torch.tensor([distance]), search=torch.tensor([search]))
    evidence = weigh(found, None, level=0.05)
    assert (bool(evidence.named), bool(evidence.noticed)) == (named, noticed)
    assert evidence.scan is None
    assert evidence.noticed_below.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 6, 1 / 3])
    assert evidence.search.tolist() == [search]


def test_limits_without_held_out_images_go_by_the_name_of_the_search():
    assert without_control(["plain", "recoloured", "moved"]).tolist() == pytest.approx([1 / 3] * 3)
    assert without_control(["degraded"]).tolist() == pytest.approx([1 / 6])


@pytest.mark.parametrize("control", [True, False])
def test_a_copy_is_a_sure_one_by_any_search(control):
    """A mirrored copy of a nearly symmetric picture is noticed as it is, but undone only in the mirror."""
    found = several(
        torch.tensor([[0.32, 0.01, 1.0, 1.0]]),
        search_noise=torch.tensor([[22.0, 60.0, torch.nan, torch.nan]]),
        search_distances=torch.tensor([[3.0, 0.004, 0.3, 0.3]]),
        search_sources=torch.tensor([[7, 7, 1, 2]]),
    )
    evidence = weigh(found, copies(innocent(100, seed=1)) if control else None, level=0.05)
    assert bool(evidence.sure)
    assert evidence.search.tolist() == [1]


def first(row):
    return row.index(True) if any(row) else None


@pytest.mark.parametrize("seed", range(3))
def test_an_image_is_shown_by_the_search_that_names_or_notices_it(seed):
    """Against the rule, word by word, with a search whose limit is 0 since a held-out image has a ratio of 0."""
    torch.manual_seed(seed)
    exponents = 1 / torch.tensor([12.0, 8.0, 5.0, 3.0])
    held_out = several(torch.rand(300, 4) ** exponents)
    held_out.search_ratios[0, 3] = 0
    generated = several(torch.rand(60, 4) ** exponents, search_sources=torch.randint(2, (60, 4)))
    generated.search_ratios[:40] *= torch.where(torch.rand(40, 4) < 0.5, 0.3, 1.0)
    evidence = weigh(generated, held_out, level=0.05)
    assert evidence.noticed_below[3] == 0
    unusual = combined_p_values(generated.search_ratios, held_out.search_ratios).searches.tolist()
    kinds = set()
    for i, sources in enumerate(generated.search_sources.tolist()):
        notices = [bool(generated.search_ratios[i, s] < evidence.noticed_below[s]) for s in range(4)]
        agreeing = first([yes and sources[s] == sources[unusual[i]] for s, yes in enumerate(notices)])
        if agreeing is not None:
            expected = agreeing
        elif evidence.discovered[i] or not any(notices):
            expected = unusual[i]
        else:
            expected = first(notices)
        assert evidence.search[i] == expected
        kinds.add((bool(evidence.discovered[i]), any(notices)))
        if evidence.discovered[i]:  # of whatever search: the training image is that of the one that named it
            assert sources[expected] == sources[unusual[i]]
    assert {(True, True), (False, False)} <= kinds
    assert telling_searches(generated, held_out, evidence.noticed_below)[~evidence.discovered].tolist() == (
        evidence.search[~evidence.discovered].tolist()
    )


def test_images_that_the_scan_counts_are_shown_by_its_search():
    generated, held_out = by_searches(100, seed=2), by_searches(100, seed=3)
    generated.search_ratios[:12, 1] = 0.3
    evidence = weigh(generated, held_out, level=1e-9)
    assert not evidence.named.any()
    assert (evidence.scan_search, evidence.scan.p_value < 0.01) == (1, True)
    counted = generated.search_ratios[:, 1] <= evidence.scan.threshold
    assert int(counted.sum()) == evidence.scan.generated
    assert evidence.search[counted].tolist() == [1] * evidence.scan.generated


def test_images_less_likely_than_every_held_out_image_are_counted_over_all_searches_at_once():
    generated, held_out = by_searches(200, seed=4), by_searches(200, seed=5)
    evidence = weigh(generated, held_out, level=0.05)
    combined = combined_p_values(generated.search_ratios, held_out.search_ratios)
    ratios = [float(row[search]) for row, search in zip(generated.search_ratios, combined.searches, strict=True)]
    pairs = zip(combined.p_values.tolist(), ratios, strict=True)
    assert evidence.beyond.tolist() == [p < 1.5 / 201 and ratio <= 0.5 for p, ratio in pairs]
    below_any = (generated.search_ratios < held_out.search_ratios.amin(dim=0)).any(dim=1)
    assert int(evidence.beyond.sum()) < int(below_any.sum())


def test_false_finds_stay_below_the_promise():
    """Over 200 seeds of innocent images of low variety; 5 % of the audits may name one."""
    wrong = 0
    for seed in range(200):
        torch.manual_seed(seed)
        scores = torch.rand(260) ** (1 / 6)  # ratios of points in six dimensions
        evidence = weigh(copies(scores[:130].tolist()), copies(scores[130:].tolist()), level=0.05)
        wrong += bool(evidence.named.any()) or evidence.scan.p_value < 0.01
    assert wrong <= 10


@pytest.mark.parametrize("correlation", [0.0, 0.95])
@pytest.mark.parametrize("copied", [0, 4])
def test_the_share_of_false_finds_stays_below_the_promise(correlation, copied):
    """Over 200 audits by four searches with tails of their own, independent or strongly dependent."""
    _, false, found = simulated(200, correlation=correlation, copied=copied)
    assert false <= 0.05
    assert found >= 0.9 or not copied


def test_many_copies_among_few_held_out_images_are_named_as_promised():
    """Over 200 seeds of three searches with tails of their own; copies are found by one of two of them."""
    shares, found = [], 0
    for seed in range(200):
        torch.manual_seed(seed)
        ratios = torch.rand(300, 3) ** (1 / torch.tensor([12.0, 8.0, 5.0]))
        ratios[:20, 0] *= 0.2
        ratios[20:40, 1] *= 0.1
        named, _, _ = discover(ratios[:100], ratios[100:], level=0.05)
        shares.append(float(named[40:].sum() / named.sum().clamp(min=1)))
        found += int(named[:40].sum())
    assert sum(shares) / 200 <= 0.05
    assert found >= 200 * 30 * 0.9
