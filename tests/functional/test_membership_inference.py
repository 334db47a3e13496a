import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from lightning_iet.functional.membership_inference import (
    auc_interval,
    membership_inference,
    roc_auc,
    roc_curve,
    tpr_at_fpr,
)

losses = st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0, 2.0, math.inf]), min_size=1, max_size=20)


def labels_and_scores(members, non_members):
    """As scikit-learn wants them: a higher score means a member."""
    scores = -torch.cat([members, non_members]).clamp(max=100)  # it takes no infinity
    return [1] * len(members) + [0] * len(non_members), scores.numpy()


@given(members=losses, non_members=losses)
def test_auc_equals_scikit_learn_with_ties(members, non_members):
    members, non_members = torch.tensor(members), torch.tensor(non_members)
    expected = roc_auc_score(*labels_and_scores(members, non_members))
    assert roc_auc(members, non_members).item() == pytest.approx(expected, abs=1e-12)


@given(seed=st.integers(0, 1000))
def test_auc_equals_scikit_learn_without_ties(seed):
    draw = torch.Generator().manual_seed(seed)
    members, non_members = torch.randn(150, generator=draw), torch.randn(90, generator=draw) + 0.3
    expected = roc_auc_score(*labels_and_scores(members, non_members))
    assert roc_auc(members, non_members).item() == pytest.approx(expected, abs=1e-12)
    assert roc_auc(non_members, members).item() == pytest.approx(1 - expected, abs=1e-12)


@given(members=losses, non_members=losses, rate=st.sampled_from([0.0, 0.001, 0.05, 0.1, 0.29, 0.5, 1.0]))
def test_tpr_equals_the_best_threshold(members, non_members, rate):
    best = 0.0
    for threshold in [-1.0, *members, *non_members]:
        false_positives = sum(loss <= threshold for loss in non_members) / len(non_members)
        if false_positives <= rate:
            best = max(best, sum(loss <= threshold for loss in members) / len(members))
    assert tpr_at_fpr(torch.tensor(members), torch.tensor(non_members), rate).item() == pytest.approx(best)


def test_tpr_allows_just_as_many_false_positives_as_the_rate():
    non_members, members = torch.arange(100.0), torch.arange(100.0) - 0.5
    assert tpr_at_fpr(members, non_members, 0.29).item() == 0.30  # 29 of them: losses 0 to 28
    assert tpr_at_fpr(members, non_members, 0.001).item() == 0.01


@given(members=losses, non_members=losses)
def test_roc_curve_equals_scikit_learn(members, non_members):
    members, non_members = torch.tensor(members), torch.tensor(non_members)
    expected = sklearn_roc_curve(*labels_and_scores(members, non_members), drop_intermediate=False)
    for found, wanted in zip(roc_curve(members, non_members), expected[:2], strict=True):
        assert found.numpy() == pytest.approx(wanted)


def naive_delong(members, non_members, z=1.959963984540054):
    """DeLong's variance from all pairs."""
    pairs = np.array([[(a < b) + 0.5 * (a == b) for b in non_members] for a in members])
    auc = pairs.mean()
    variance = pairs.mean(1).var(ddof=1) / len(members) + pairs.mean(0).var(ddof=1) / len(non_members)
    return max(0, auc - z * variance**0.5), min(1, auc + z * variance**0.5)


@given(seed=st.integers(0, 1000), decimals=st.integers(0, 3))
def test_interval_equals_delong(seed, decimals):
    draw = torch.Generator().manual_seed(seed)
    members = torch.rand(25, generator=draw).round(decimals=decimals)
    non_members = torch.rand(17, generator=draw).round(decimals=decimals)
    found = [end.item() for end in auc_interval(members, non_members)]
    assert found == pytest.approx(naive_delong(members.tolist(), non_members.tolist()), abs=1e-9)


def test_interval_covers_the_truth_nineteen_times_in_twenty():
    draw = torch.Generator().manual_seed(0)
    truth = 0.5 * (1 + math.erf(0.5 / 2))  # of two normal distributions half a standard deviation apart
    hits = 0
    for _ in range(400):
        low, high = auc_interval(torch.randn(100, generator=draw) - 0.5, torch.randn(80, generator=draw))
        hits += bool(low <= truth <= high)
    assert 0.92 <= hits / 400 <= 0.98


@given(seed=st.integers(0, 1000))
def test_the_order_does_not_change_a_bit(seed):
    draw = torch.Generator().manual_seed(seed)
    members, non_members = torch.rand(2, 30, generator=draw)
    expected = membership_inference(members, non_members)
    assert membership_inference(members[torch.randperm(30, generator=draw)], non_members.flip(0)) == expected


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (torch.zeros(0), r"Argument `members` expected one loss .* but got \(0,\)"),
        (torch.zeros(3, 2), r"Argument `members` expected one loss .* but got \(3, 2\)"),
        (torch.tensor([1.0, math.nan]), "Argument `members` expected numbers, but got NaN for 1 of 2"),
    ],
)
def test_bad_losses_are_refused_in_one_line(members, message):
    with pytest.raises(ValueError, match=message) as caught:
        membership_inference(members, torch.rand(3))
    assert "\n" not in str(caught.value)


def test_losses_of_several_precisions_compare():
    members, non_members = torch.tensor([0.25, 0.5, 1.0]), torch.tensor([0.5, 2.0])
    expected = membership_inference(members, non_members)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert membership_inference(members.to(dtype), non_members) == expected
        assert membership_inference(members.to(dtype), non_members.to(dtype)) == expected


def test_where_the_variances_vanish_the_interval_is_a_point():
    for members, auc in ((torch.ones(5), 0.5), (torch.zeros(5), 1.0)):
        assert [end.item() for end in auc_interval(members, torch.ones(5))] == [auc, auc]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: tpr_at_fpr(x, x, -0.1), r"Argument `rate` expected a number in \[0, 1\], but got -0.1"),
        (lambda x: tpr_at_fpr(x, x, 1.5), r"Argument `rate` expected a number in \[0, 1\], but got 1.5"),
        (lambda x: auc_interval(x, x, confidence=2), r"Argument `confidence` expected a number in \(0, 1\), but got 2"),
        (lambda x: membership_inference(x, x, rates=(2,)), r"Argument `rates` expected numbers in \[0, 1\], but got"),
        (lambda x: membership_inference(x, x, rates=(0.1, 0.1)), "Argument `rates` expected numbers that differ"),
        (lambda x: roc_auc(x, x[:0]), r"Argument `non_members` expected one loss .* but got \(0,\)"),
        (lambda x: roc_curve(x[:0], x), r"Argument `members` expected one loss .* but got \(0,\)"),
        (lambda x: roc_curve(x, x * torch.nan), "Argument `non_members` expected numbers, but got NaN for 5 of 5"),
    ],
)
def test_bad_settings_are_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(torch.arange(5.0))
    assert "\n" not in str(caught.value)
