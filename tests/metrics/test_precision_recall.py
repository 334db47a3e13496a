"""Precision and recall, density and coverage: the same two sets of images, and the same settings."""

import pytest
import torch

from lightning_iet.functional.density_coverage import density_coverage
from lightning_iet.functional.precision_recall import precision_recall
from lightning_iet.metrics import DensityCoverage, PrecisionRecall, feature_extractor

both = pytest.mark.parametrize(
    ("cls", "function", "default", "below"),
    [(PrecisionRecall, precision_recall, 3, 1.5), (DensityCoverage, density_coverage, 5, 3)],
)


@both
@pytest.mark.parametrize("options", [{}, {"k": 2}])
def test_equals_the_function_on_the_features(cls, function, default, below, options):
    generated, real = torch.rand(30, 1, 8, 8), torch.rand(40, 1, 8, 8)
    if cls is PrecisionRecall:
        real = real**1.5
    metric = cls("digits", **options)
    metric.update(real, real=True)
    metric.update(generated[:11], real=False)
    metric.update(generated[11:], real=False)
    network = feature_extractor("digits")
    expected = function(network(generated), network(real), k=options.get("k", default))
    assert metric.compute() == expected
    assert all(0 < value < below for value in expected.values())


@both
def test_too_few_images_and_bad_settings_are_refused(cls, function, default, below):
    with pytest.raises(ValueError, match="Argument `k` expected at least 1, but got 0"):
        cls("pixels", k=0)
    metric = cls("pixels")
    for real in (True, False):
        metric.update(torch.rand(default, 1, 4, 4), real=real)
    with pytest.raises(ValueError, match=rf"Argument `k` expected a number from 1 to .*, but got {default}. Pass"):
        metric.compute()
