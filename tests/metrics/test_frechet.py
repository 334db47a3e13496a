import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from torch import nn

from lightning_iet.metrics import DigitsFeatures, frechet_distance


class Flat(nn.Flatten):
    """Pixels as features."""

    num_features = 16


def reference(real, fake):
    """The formula in float64, with scipy's matrix square root."""
    (mean_1, cov_1), (mean_2, cov_2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (real, fake))
    return ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * sqrtm(cov_1 @ cov_2).real)


def measure(metric, real, fake):
    for images, is_real in ((real, True), (fake, False)):
        for batch in images.split(100):
            metric.update(batch, real=is_real)
    return metric.compute().item()


@pytest.fixture(scope="module")
def digits():
    return torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16


def test_equals_the_formula_on_pixels():
    real, fake = torch.rand(300, 1, 4, 4), torch.rand(250, 1, 4, 4) ** 2
    expected = reference(real.flatten(1).double().numpy(), fake.flatten(1).double().numpy())
    assert measure(frechet_distance(Flat()), real, fake) == pytest.approx(expected, rel=1e-4)


def test_equals_the_formula_on_digits_features(digits):
    real, fake = digits[::2], digits[1::2].roll(1, dims=-1)
    expected = reference(*(DigitsFeatures()(images).double().numpy() for images in (real, fake)))
    assert expected > 1
    assert measure(frechet_distance("digits"), real, fake) == pytest.approx(expected, rel=1e-3)


def test_worse_images_are_farther_away(digits):
    real, rest = digits[::2], digits[1::2]
    noise = torch.rand(rest.shape, generator=torch.Generator().manual_seed(0))
    distances = [measure(frechet_distance(), real, rest.lerp(noise, weight)) for weight in (0.0, 0.2, 0.5, 1.0)]
    assert distances == sorted(distances)
    assert distances[0] < 1 < 10 < distances[-1]


def test_equal_images_are_at_distance_zero(digits):
    assert measure(frechet_distance(), digits, digits) == pytest.approx(0, abs=1e-3)


def test_uint8_equals_float(digits):
    real, fake = ((images * 255).round().byte() for images in (digits[::2], digits[1::2]))
    assert measure(frechet_distance(), real, fake) == measure(frechet_distance(), real / 255, fake / 255)


def test_double_precision_may_be_asked_for(digits):
    single, double = frechet_distance(), frechet_distance().set_dtype(torch.float64)
    real, fake = digits[::2], digits[1::2]
    assert measure(double, real, fake) == pytest.approx(measure(single, real, fake), rel=1e-3)


def test_options_reach_torchmetrics(digits):
    metric = frechet_distance(reset_real_features=False)
    first = measure(metric, digits[::2], digits[1::2])
    metric.reset()
    metric.update(digits[1::2], real=False)
    assert metric.compute().item() == pytest.approx(first)


def test_a_network_that_does_not_say_its_width_is_refused():
    with pytest.raises(ValueError, match="attribute `num_features`, but got Flatten without one"):
        frechet_distance(nn.Flatten())
