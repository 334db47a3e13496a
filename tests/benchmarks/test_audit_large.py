"""What an audit costs over its arithmetic, measured on a few small images."""

import re
import sys

import pytest

from benchmarks import audit_large
from lightning_iet.audit import features
from lightning_iet.metrics.features import EfficientNetFeatures


@pytest.mark.parametrize("arguments", [["--size", "72"], ["network", "--images", "65"]])
def test_it_runs_both_sides_and_prints_their_ratio(arguments, monkeypatch, capsys):
    monkeypatch.setattr(audit_large, "SIDE_OF_NETWORK", 32)  # at 224 it takes half a minute
    monkeypatch.setattr(features, "feature_extractor", lambda name, weights: EfficientNetFeatures(size=32))
    monkeypatch.setattr(sys, "argv", ["audit_large", *arguments, "--repeats", "1"])
    audit_large.main()
    assert re.search(r"alone [\d.]+ s, audit [\d.]+ s: ratio [\d.]+ \(at most 1\.\d\)", capsys.readouterr().out)


def test_distances_of_the_baseline_are_those_of_the_audit():
    rows = audit_large.pictures(4, 1, 16, seed=0).flatten(1).float()
    expected = (rows.double()[:, None] - rows.double()).square().sum(dim=2)
    assert (audit_large.squared_distances(rows, rows) - expected).abs().max() < 1e-5 * expected.max()
