import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional.precision_recall import precision_recall


def naive(generated, real, k):
    """Kynkäänniemi et al., section 2, point by point."""

    def share(points, centers):
        hits = 0
        for point in points:
            for i, center in enumerate(centers):
                others = [(center - other).norm() for j, other in enumerate(centers) if j != i]
                if (point - center).norm() <= sorted(others)[k - 1]:
                    hits += 1
                    break
        return hits / len(points)

    generated, real = generated.double(), real.double()
    return {"precision": share(generated, real), "recall": share(real, generated)}


def draw(seed, shift=0.5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 2, generator=generator) + shift, torch.randn(15, 2, generator=generator)


@given(seed=st.integers(0, 1000), k=st.integers(1, 4))
def test_equals_the_loop(seed, k):
    generated, real = draw(seed)
    found = {name: value.item() for name, value in precision_recall(generated, real, k=k).items()}
    assert found == pytest.approx(naive(generated, real, k))


@given(seed=st.integers(0, 1000))
def test_a_set_has_precision_and_recall_one_in_itself_in_any_order(seed):
    features, _ = draw(seed)
    assert precision_recall(features.flip(0), features) == {"precision": 1, "recall": 1}


@given(seed=st.integers(0, 1000))
def test_the_order_does_not_matter(seed):
    generated, real = draw(seed)
    assert precision_recall(generated.flip(0), real.roll(3, dims=0)) == precision_recall(generated, real)


@given(seed=st.integers(0, 1000))
def test_swapping_the_sets_swaps_the_figures(seed):
    generated, real = draw(seed)
    one, other = precision_recall(generated, real), precision_recall(real, generated)
    assert (one["precision"], one["recall"]) == (other["recall"], other["precision"])


def test_far_away_is_nothing():
    generated, real = draw(0, shift=100)
    assert precision_recall(generated, real) == {"precision": 0, "recall": 0}
