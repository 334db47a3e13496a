import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torchmetrics.image.mifid import _mifid_compute

from lightning_iet.functional.average_minimum_distance import unit_rows
from lightning_iet.functional.mifid import (
    frechet_distance,
    memorization_distances,
    mifid,
    moments,
    moments_of_sums,
    penalized,
)


def naive_memorization(generated, train):
    """1 - |cos| to the training row where that is least, averaged over generated rows."""
    total = 0
    for x in generated.double():
        total += min(1 - abs((x @ y / x.norm() / y.norm()).item()) for y in train.double())
    return total / len(generated)


@given(seed=st.integers(0, 1000), shift=st.sampled_from([0.0, 1.0]), threshold=st.sampled_from([0.0, 0.02, 1.0]))
def test_equals_its_definition(seed, shift, threshold):
    draw = torch.Generator().manual_seed(seed)
    generated, train = torch.randn(2, 12, 4, generator=draw) + shift
    memorization = naive_memorization(generated, train)
    expected = frechet_distance(moments(generated), moments(train)).item()
    if memorization < threshold:
        expected /= memorization + 1e-14
    assert mifid(generated, train, threshold=threshold).item() == pytest.approx(expected, rel=1e-3)


def test_signs_do_not_matter_to_the_distance():
    generated, train = torch.randn(6, 4), torch.randn(9, 4)
    expected = memorization_distances(unit_rows(generated), unit_rows(train))
    torch.testing.assert_close(memorization_distances(unit_rows(-generated), unit_rows(train)), expected)


def test_one_copied_image_is_punished_and_torchmetrics_does_not():
    """The stock class looks from training images to generated ones."""
    draw = torch.Generator().manual_seed(0)
    train = torch.rand(60, 8, generator=draw)
    copies = train[:1].expand(40, -1) + 1e-4 * torch.rand(40, 8, generator=draw)
    novel = torch.rand(40, 8, generator=draw)
    penalty = mifid(copies, train, threshold=0.03) / mifid(copies, train, threshold=0)
    assert penalty > 1e5
    assert mifid(novel, train, threshold=0.001) == mifid(novel, train, threshold=0)
    arguments = (*moments(train), train.double(), *moments(copies), copies.double())
    stock = _mifid_compute(*arguments, cosine_distance_eps=0.03) / _mifid_compute(*arguments, cosine_distance_eps=0)
    assert stock.item() == pytest.approx(1)


def test_equals_torchmetrics_given_the_sets_in_the_right_order():
    generated, train = torch.rand(50, 8), torch.rand(60, 8)
    right = (*moments(generated), generated.double(), *moments(train), train.double())
    expected = _mifid_compute(*right, cosine_distance_eps=0.5).item()
    assert mifid(generated, train, threshold=0.5).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-5])
def test_a_perfect_copier_gets_the_worst_figure_not_the_best(noise):
    draw = torch.Generator().manual_seed(0)
    train, held_out = torch.rand(2, 60, 8, generator=draw)
    copies = train[torch.randperm(60, generator=draw)] + noise * torch.rand(60, 8, generator=draw)
    assert mifid(copies, train) > 1000 * mifid(held_out, train, threshold=0)
    assert mifid(copies, train, threshold=0) < 1e-6


def test_where_both_distances_vanish_the_figure_is_infinite():
    rounding = torch.tensor(1e-9), torch.tensor(0.0)
    assert penalized(*rounding, threshold=0.1).isinf()
    assert penalized(*rounding, threshold=0.0) == rounding[0]


@pytest.mark.parametrize(
    ("sizes", "threshold", "message"),
    [
        ((1, 5), 0.1, "Argument `generated` expected at least 2 images, but got 1"),
        ((5, 1), 0.1, "Argument `train` expected at least 2 images, but got 1"),
        ((5, 5), -1.0, r"Argument `threshold` expected a number in \[0, 1\], but got -1.0"),
    ],
)
def test_bad_input_is_refused(sizes, threshold, message):
    with pytest.raises(ValueError, match=message):
        mifid(torch.rand(sizes[0], 4), torch.rand(sizes[1], 4), threshold=threshold)


def reference(real, fake):
    """The formula, with scipy's matrix square root."""
    (mean_1, cov_1), (mean_2, cov_2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (real, fake))
    return ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * sqrtm(cov_1 @ cov_2).real)


@given(seed=st.integers(0, 1000), sizes=st.tuples(st.integers(10, 60), st.integers(10, 60)), width=st.integers(2, 8))
def test_equals_the_formula(seed, sizes, width):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=draw)
    first, second = torch.randn(sizes[0], width, generator=draw), torch.randn(sizes[1], width, generator=draw) @ mix + 1
    found = frechet_distance(moments(first), moments(second)).item()
    assert found == pytest.approx(reference(first.double().numpy(), second.double().numpy()), rel=1e-6)


def test_equals_torchmetrics_with_fewer_images_than_features():
    from torchmetrics.image.fid import _compute_fid

    first, second = moments(torch.rand(10, 64)), moments(torch.rand(12, 64) * 2)
    assert frechet_distance(first, second).item() == pytest.approx(_compute_fid(*first, *second).item(), rel=1e-4)


def test_equal_sets_are_at_distance_zero():
    features = torch.rand(20, 50) * 100
    assert frechet_distance(moments(features), moments(features)).item() == pytest.approx(0, abs=1e-6)


@given(seed=st.integers(0, 1000))
def test_is_symmetric(seed):
    draw = torch.Generator().manual_seed(seed)
    first, second = moments(torch.randn(9, 4, generator=draw)), moments(torch.randn(8, 4, generator=draw))
    torch.testing.assert_close(frechet_distance(first, second), frechet_distance(second, first))


def test_sums_give_the_same_moments():
    rows = torch.randn(40, 5)
    double = rows.double()
    found = moments_of_sums(torch.tensor(40), double.sum(dim=0), double.T @ double)
    for value, expected in zip(found, moments(rows), strict=True):
        torch.testing.assert_close(value, expected)
