import torch

from lightning_iet.functional.average_minimum_distance import average_minimum_distance
from lightning_iet.metrics import AverageMinimumDistance, feature_extractor


def test_equals_the_function_on_the_features():
    generated, train = torch.rand(2, 20, 1, 8, 8)
    metric = AverageMinimumDistance(train, features="digits")
    metric.update(generated[:3])
    metric.update(generated[3:])
    network = feature_extractor("digits")
    torch.testing.assert_close(metric.compute(), average_minimum_distance(network(generated), network(train)))


def test_copies_lower_it():
    generated, train = torch.rand(2, 20, 1, 8, 8)
    values = []
    for copies in (0, 5, 20):
        metric = AverageMinimumDistance(train, features="pixels")
        metric.update(torch.cat([train[:copies], generated[copies:]]))
        values.append(metric.compute().item())
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0
