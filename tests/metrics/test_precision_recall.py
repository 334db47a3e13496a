import pytest
import torch

from lightning_iet.functional.precision_recall import precision_recall
from lightning_iet.metrics import PrecisionRecall, feature_extractor


@pytest.mark.parametrize("options", [{}, {"k": 2}])
def test_equals_the_function_on_the_features(options):
    generated, real = torch.rand(30, 1, 8, 8), torch.rand(40, 1, 8, 8) ** 1.5
    metric = PrecisionRecall("digits", **options)
    metric.update(real, real=True)
    metric.update(generated[:11], real=False)
    metric.update(generated[11:], real=False)
    network = feature_extractor("digits")
    expected = precision_recall(network(generated), network(real), k=options.get("k", 3))
    assert metric.compute() == expected
    assert all(0 < value < 1.5 for value in expected.values())


def test_too_few_images_and_bad_settings_are_refused():
    with pytest.raises(ValueError, match="Argument `k` expected at least 1, but got 0"):
        PrecisionRecall("pixels", k=0)
    metric = PrecisionRecall("pixels")
    for real in (True, False):
        metric.update(torch.rand(3, 1, 4, 4), real=real)
    with pytest.raises(ValueError, match=r"Argument `k` expected a number from 1 to .*, but got 3. Pass"):
        metric.compute()
