import pytest
import torch

from lightning_iet.functional.checks import unit_interval
from lightning_iet.functional.nearest_training_distance import nearest_training_distance
from lightning_iet.metrics import NearestTrainingDistance, feature_extractor
from lightning_iet.metrics.features import embed_images


def draw(num=20, side=8):
    images = torch.randint(256, (2, num, 1, side, side), dtype=torch.uint8)
    return images[0], images[1]


def test_pixels_equal_the_function():
    generated, train = draw()
    metric = NearestTrainingDistance(train, quantiles=(0.1, 0.9))
    metric.update(generated)
    # Not to the bit: the function leaves uint8 as it is, and so rounds elsewhere.
    torch.testing.assert_close(metric.compute(), nearest_training_distance(generated, train, quantiles=(0.1, 0.9)))


@pytest.mark.parametrize("features", ["digits", feature_extractor("digits")])
def test_features_equal_the_double_loop(features):
    generated, train = draw()
    metric = NearestTrainingDistance(train, features=features, quantiles=(0.0, 1.0))
    metric.update(generated)
    rows = [embed_images(feature_extractor("digits"), unit_interval(images)).double() for images in (generated, train)]
    nearest = [min((x - y).norm().item() for y in rows[1]) for x in rows[0]]
    expected = {"mean": sum(nearest) / len(nearest), "q0": min(nearest), "q1": max(nearest)}
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected, rel=1e-4)


def test_pixels_of_a_large_set_may_stay_uint8():
    _, train = draw()
    assert NearestTrainingDistance(train).features is None


def test_training_features_follow_the_device_and_the_network_too():
    metric = NearestTrainingDistance(draw()[1], features="digits").to("meta")
    assert metric.train_rows.device.type == next(metric.features.parameters()).device.type == "meta"


@pytest.mark.parametrize("quantiles", [(-0.1,), (0.5, 1.5), (float("nan"),)])
def test_bad_quantiles_are_refused(quantiles):
    with pytest.raises(ValueError, match=r"Argument `quantiles` expected numbers in \[0, 1\], but got"):
        NearestTrainingDistance(draw()[1], quantiles=quantiles)


def test_unknown_features_are_refused():
    with pytest.raises(ValueError, match="but got 'resnet'"):
        NearestTrainingDistance(draw()[1], features="resnet")
