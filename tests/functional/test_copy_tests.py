import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, hypergeom

from lightning_iet.functional.copy_tests import (
    combined_p_values,
    false_discoveries,
    held_out_needed,
    noticeable_below,
    scan_test,
)
from tests.helpers.conformal import conformal_p_values


def statistic(labels, scores, largest):
    """The smallest tail over all thresholds, one by one."""
    m, total, least = sum(labels), len(labels), 1.0
    for threshold in sorted(set(scores)):
        below = [label for label, score in zip(labels, scores, strict=True) if score <= threshold]
        if threshold <= largest and len(below) < total:
            least = min(least, float(hypergeom.sf(sum(below) - 1, total, m, len(below))))
    return least


def exchanged(generated, held_out, largest):
    """Over all ways to call ``m`` of the images generated, the share with so small a statistic."""
    scores, m = generated + held_out, len(generated)
    observed = statistic([i < m for i in range(len(scores))], scores, largest)
    found = [
        statistic([i in chosen for i in range(len(scores))], scores, largest)
        for chosen in map(set, combinations(range(len(scores)), m))
    ]
    return sum(value <= observed * (1 + 1e-9) for value in found) / len(found)


some_scores = st.lists(st.integers(0, 6).map(lambda i: i / 8), min_size=1, max_size=5)


@given(some_scores, some_scores, st.sampled_from([0.3, 0.5, float("inf")]))
@settings(deadline=None, max_examples=60)
def test_the_p_value_is_that_of_all_exchanges_of_labels(generated, held_out, largest):
    found = scan_test(torch.tensor(generated), torch.tensor(held_out), largest=largest)
    assert found.p_value == pytest.approx(exchanged(generated, held_out, largest))
    if found.threshold == found.threshold:
        assert found.generated == sum(score <= found.threshold for score in generated)
        assert found.held_out == sum(score <= found.threshold for score in held_out)


def test_a_scan_that_looks_nowhere_finds_nothing():
    found = scan_test(torch.tensor([0.9]), torch.tensor([0.8, 0.7]), largest=0.5)
    assert (found.generated, found.held_out, found.p_value) == (0, 0, 1.0)


def test_innocent_sets_are_seldom_called_copies():
    """Over 150 seeds the level holds, whatever the sizes of the sets."""
    rejected = 0
    for seed in range(150):
        torch.manual_seed(seed)
        m, n = int(torch.randint(5, 400, ())), int(torch.randint(5, 400, ()))
        rejected += scan_test(torch.rand(m), torch.rand(n), largest=0.5).p_value <= 0.05
    assert rejected <= 16  # 7.5 are expected; more than 16 come up once in 600 times


def test_copies_are_seen_where_one_threshold_would_miss_them():
    torch.manual_seed(0)
    held_out = 0.56 + 0.44 * torch.rand(1000)
    copied = torch.cat([torch.full((20,), 0.5), 0.56 + 0.44 * torch.rand(880)])
    assert scan_test(copied, held_out).p_value < 1e-5
    assert scan_test(copied, held_out).generated == 20


apart = st.lists(st.integers(1, 10_000).map(lambda part: part / 10_000), min_size=1, max_size=20)


@given(apart, apart)
def test_p_values_of_one_search_by_counting(scores, held_out):
    found = combined_p_values(*(torch.tensor(part, dtype=torch.double)[:, None] for part in (scores, held_out)))
    assert found.p_values.tolist() == [(1 + sum(h <= s for h in held_out)) / (len(held_out) + 1) for s in scores]


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=20), st.sampled_from([0.01, 0.05, 0.2]))
def test_false_discoveries_by_the_step_up_rule(p_values, level):
    ordered = sorted(torch.tensor(p_values, dtype=torch.double).tolist())
    largest = max((p for i, p in enumerate(ordered, 1) if p <= level * i / len(ordered)), default=0)
    found = false_discoveries(torch.tensor(p_values, dtype=torch.double), level=level)
    close = [abs(p - level * i / len(ordered)) < 1e-12 for i, p in enumerate(ordered, 1)]
    if not any(close):  # on the boundary rounding decides
        assert found.tolist() == [p <= largest for p in p_values]


@pytest.mark.parametrize(("copies", "generated"), [(6, 900), (18, 900), (1, 20), (5, 70), (3, 2_000)])
def test_so_many_held_out_images_decide_and_one_less_does_not(copies, generated):
    needed = held_out_needed(copies, generated)
    for n, named in ((needed, copies), (needed - 1, 0)):
        scores = torch.cat([torch.zeros(copies), torch.ones(generated - copies)])
        assert int(false_discoveries(conformal_p_values(scores, torch.full((n,), 0.5))).sum()) == named


@pytest.mark.parametrize("scores", [torch.empty(0), torch.tensor([0.1, torch.nan]), torch.rand(2, 2)])
def test_scores_that_are_none(scores):
    with pytest.raises(ValueError, match=r"^Argument `generated` expected one score for each"):
        scan_test(scores, torch.rand(3))
    with pytest.raises(ValueError, match=r"^Argument `held_out` expected one score for each"):
        noticeable_below(scores, 3)


def test_no_images_make_no_discoveries():
    assert false_discoveries(torch.empty(0)).shape == (0,)


@pytest.mark.parametrize("dimensions", [4, 12, 40])
def test_innocent_images_seldom_lie_below_what_is_noticed(dimensions):
    """Ratios to the nearest and the next of random points; in one audit of 20 an innocent image may be noticed."""
    noticed = 0
    for seed in range(200):
        torch.manual_seed(seed)
        train, held_out, innocent = (torch.randn(n, dimensions) for n in (400, 150, 200))
        ratios = []
        for points in (held_out, innocent):
            nearest = torch.cdist(points, train).topk(2, largest=False).values
            ratios.append(nearest[:, 0] / nearest[:, 1])
        noticed += bool((ratios[1] < noticeable_below(ratios[0], 200)).any())
    assert noticed <= 20  # 10 are allowed for; more than 20 would come up once in 600 times


def test_what_is_noticed_by_the_formula():
    scores = torch.tensor([0.4, 0.5, 0.6, 0.7, 0.8])
    exponent = chi2.ppf(0.05, 8) / 2 / sum(math.log(0.8 / s) for s in (0.4, 0.5, 0.6, 0.7))
    assert noticeable_below(scores, 10) == pytest.approx(0.8 * (0.05 * 5 / 40) ** (1 / exponent))


def test_what_is_noticed_is_fitted_to_as_many_scores_as_the_root_of_their_number():
    scores = torch.linspace(0.2, 0.9, 400, dtype=torch.double)[torch.randperm(400)]
    lowest = sorted(scores.tolist())[:21]
    exponent = chi2.ppf(0.05, 40) / 2 / sum(math.log(lowest[20] / s) for s in lowest[:20])
    assert noticeable_below(scores, 100) == pytest.approx(lowest[20] * (0.05 * 400 / 2000) ** (1 / exponent))


@pytest.mark.parametrize("scores", [[0.5], [0.0, 0.4, 0.5, 0.6], [0.3, 0.5]])
def test_held_out_scores_that_say_nothing(scores):
    assert noticeable_below(torch.tensor(scores), 10) == 0


def naive_combined(row, control):
    """One image against all held-out images, by lists and loops."""
    pool = [[max(value, 1e-4) for value in image] for image in [row, *control]]
    k = min(max(10, len(pool) // 10), len(pool) - 1)
    tails = []
    for search in range(len(row)):
        column = sorted(image[search] for image in pool)
        mean = sum(math.log(column[k] / value) for value in column[:k]) / k
        tails.append((column[k], 1 / max(mean, 1e-9)))
    likeness = [min(a * math.log(x / t) for x, (t, a) in zip(image, tails, strict=True)) for image in pool]
    return sum(value <= likeness[0] + 1e-12 for value in likeness) / len(pool)


@pytest.mark.parametrize(("m", "n", "searches"), [(5, 1, 3), (40, 9, 2), (20, 150, 3), (300, 30, 1)])
def test_combined_p_values_by_hand(m, n, searches):
    torch.manual_seed(m)
    exponents = torch.tensor([8.0, 2.0, 4.0])[:searches]
    scores, held_out = (torch.rand(size, searches, dtype=torch.double) ** (1 / exponents) for size in (m, n))
    scores[0] = 0
    found = combined_p_values(scores, held_out)
    expected = [naive_combined(row, held_out.tolist()) for row in scores.tolist()]
    assert found.p_values.tolist() == pytest.approx(expected)
    if searches == 1:
        assert torch.equal(found.p_values, conformal_p_values(scores[:, 0], held_out[:, 0]))


some_rows = st.integers(1, 3).flatmap(
    lambda searches: st.lists(
        st.lists(
            st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.8, 1.0]) | st.floats(0, 1), min_size=searches, max_size=searches
        ),
        min_size=2,
        max_size=40,
    )
)


@given(some_rows)
@settings(max_examples=100, deadline=None)
def test_any_of_exchangeable_images_is_as_likely_to_have_any_rank(rows):
    """Each image in turn is the generated one: at most ``j`` of ``n + 1`` have a p-value of at most ``j / (n + 1)``."""
    pool = torch.tensor(rows, dtype=torch.double)
    keep = ~torch.eye(len(pool), dtype=torch.bool)
    p_values = [float(combined_p_values(pool[i : i + 1], pool[keep[i]]).p_values) for i in range(len(pool))]
    for rank in range(1, len(pool) + 1):
        assert sum(value <= rank / len(pool) + 1e-9 for value in p_values) <= rank


def test_a_search_that_comes_near_to_innocent_images_takes_nothing_from_another():
    held_out = torch.stack([torch.linspace(0.6, 1, 100), torch.linspace(0.01, 1, 100)], dim=1)
    found = combined_p_values(torch.tensor([[0.3, 0.9], [0.9, 0.3]]), held_out)
    assert found.p_values[0] == pytest.approx(1 / 101)
    assert found.p_values[1] > 0.2
    assert found.searches.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("scores", "held_out"),
    [
        (torch.rand(3), torch.rand(4)),
        (torch.rand(3, 2), torch.rand(4, 3)),
        (torch.rand(3, 2), torch.rand(0, 2)),
        (torch.full((3, 2), torch.nan), torch.rand(4, 2)),
        (torch.rand(3, 2), torch.full((4, 2), torch.nan)),
    ],
)
def test_combined_p_values_refuse_what_they_cannot_rank(scores, held_out):
    with pytest.raises(ValueError, match="expected"):
        combined_p_values(scores, held_out)
