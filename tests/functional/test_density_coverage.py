import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional.density_coverage import density_coverage


def naive(generated, real, k):
    """Naeem et al., equations 3 and 5, point by point, with open balls."""
    generated, real = generated.double(), real.double()
    radii = [sorted((x - y).norm().item() for y in real)[k] for x in real]  # x itself is the nearest
    inside = [[(g - x).norm().item() < radius for x, radius in zip(real, radii, strict=True)] for g in generated]
    density = sum(sum(row) for row in inside) / (k * len(generated))
    coverage = sum(any(row[j] for row in inside) for j in range(len(real))) / len(real)
    return {"density": density, "coverage": coverage}


def draw(seed, shift=0.5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 2, generator=generator) + shift, torch.randn(15, 2, generator=generator)


@given(seed=st.integers(0, 1000), k=st.integers(1, 5))
def test_equals_the_loop(seed, k):
    generated, real = draw(seed)
    found = {name: value.item() for name, value in density_coverage(generated, real, k=k).items()}
    assert found == pytest.approx(naive(generated, real, k))


@given(seed=st.integers(0, 1000), k=st.integers(1, 5))
def test_a_set_has_density_and_coverage_one_in_itself(seed, k):
    features, _ = draw(seed)
    found = density_coverage(features.flip(0), features, k=k)
    assert found["coverage"] == 1
    assert found["density"].item() == pytest.approx(1)


@given(seed=st.integers(0, 1000))
def test_the_order_does_not_matter(seed):
    generated, real = draw(seed)
    assert density_coverage(generated.flip(0), real.roll(3, dims=0)) == density_coverage(generated, real)


def test_far_away_is_nothing():
    assert density_coverage(*draw(0, shift=100)) == {"density": 0, "coverage": 0}


def test_one_generated_image_is_enough():
    generated, real = draw(0)
    assert density_coverage(generated[:1], real).keys() == {"density", "coverage"}
