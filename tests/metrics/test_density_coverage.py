import pytest
import torch

from lightning_iet.functional.density_coverage import density_coverage
from lightning_iet.metrics import DensityCoverage, feature_extractor


@pytest.mark.parametrize("options", [{}, {"k": 2}])
def test_equals_the_function_on_the_features(options):
    generated, real = torch.rand(30, 1, 8, 8), torch.rand(40, 1, 8, 8)
    metric = DensityCoverage("digits", **options)
    metric.update(real, real=True)
    metric.update(generated[:11], real=False)
    metric.update(generated[11:], real=False)
    network = feature_extractor("digits")
    expected = density_coverage(network(generated), network(real), k=options.get("k", 5))
    assert metric.compute() == expected
    assert all(0 < value < 3 for value in expected.values())


def test_too_few_images_and_bad_settings_are_refused():
    with pytest.raises(ValueError, match="Argument `k` expected at least 1, but got 0"):
        DensityCoverage("pixels", k=0)
    metric = DensityCoverage("pixels")
    for real in (True, False):
        metric.update(torch.rand(5, 1, 4, 4), real=real)
    with pytest.raises(ValueError, match=r"Argument `k` expected a number from 1 to .*, but got 5. Pass"):
        metric.compute()
