import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional.nearest_training_distance import distance_summary, nearest_training_distance


@given(seed=st.integers(0, 1000), num=st.integers(1, 12))
def test_equals_the_double_loop(seed, num):
    draw = torch.Generator().manual_seed(seed)
    generated, train = torch.rand(num, 1, 3, 3, generator=draw), torch.rand(9, 1, 3, 3, generator=draw)
    nearest = [
        min(((image - other) ** 2).sum().sqrt().item() for other in train.double()) for image in generated.double()
    ]
    found = nearest_training_distance(generated, train, quantiles=(0.0, 0.05, 0.5, 1.0))
    assert list(found) == ["mean", "q0", "q0.05", "q0.5", "q1"]
    expected = [np.mean(nearest), *np.quantile(nearest, (0.0, 0.05, 0.5, 1.0))]
    assert [value.item() for value in found.values()] == pytest.approx(expected, rel=1e-4)


@given(seed=st.integers(0, 1000), num=st.integers(1, 50))
def test_the_order_does_not_change_a_bit(seed, num):
    draw = torch.Generator().manual_seed(seed)
    distances = torch.rand(num, generator=draw) ** 8 * 1e6
    assert distance_summary(distances[torch.randperm(num, generator=draw)]) == distance_summary(distances)


def test_copies_show_in_the_low_quantiles():
    train = torch.rand(50, 1, 4, 4)
    generated = torch.rand(20, 1, 4, 4)
    generated[:2] = train[:2]
    found = nearest_training_distance(generated, train, quantiles=(0.05, 0.5))
    assert found["q0.05"] == 0 < found["q0.5"]


def test_no_distances_give_nan():
    assert all(value.isnan() for value in distance_summary(torch.zeros(0)).values())


@pytest.mark.parametrize(
    ("quantiles", "message"),
    [
        ((1.5,), r"Argument `quantiles` expected numbers in \[0, 1\], but got \(1.5,\)"),
        ((-0.5, 0.5), r"Argument `quantiles` expected numbers in \[0, 1\], but got \(-0.5, 0.5\)"),
        ((0.1234567, 0.1234569), "Argument `quantiles` expected numbers that differ in six digits"),
    ],
)
def test_bad_quantiles_are_refused(quantiles, message):
    for call in (distance_summary, lambda x, **kwargs: nearest_training_distance(x[None], x[None], **kwargs)):
        with pytest.raises(ValueError, match=message):
            call(torch.rand(9), quantiles=quantiles)
