"""Timesteps of every kind find their bins."""

import pytest
import torch

from lightning_iet.callbacks.anti_gradient_control.bins import TimestepBins


def index(timesteps, **kwargs):
    bins = TimestepBins(**({"num_timesteps": 1000} | kwargs))
    bins.inspect(timesteps)
    return bins, bins.index(timesteps)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_whole_numbers_have_a_bin_each(dtype):
    bins, found = index(torch.tensor([0, 3, 250, 128]).to(dtype))
    assert not bins.continuous
    assert found.tolist() == [0, 3, 250, 128]


def test_whole_numbers_in_fewer_bins():
    _, found = index(torch.tensor([0, 99, 100, 999]), num_bins=10)
    assert found.tolist() == [0, 0, 1, 9]


@pytest.mark.parametrize("scale", [1.0, 1000.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_continuous_times_have_bins_of_equal_probability(scale, dtype):
    times = scale * torch.rand(64, dtype=torch.float64).square()
    bins, found = index(times.to(dtype), num_bins=8)
    assert bins.continuous
    assert torch.equal(found[times.argsort()], found.sort().values)  # in order
    assert torch.bincount(found, minlength=8).sub(8).abs().max() <= (3 if dtype == torch.bfloat16 else 1)


def test_bins_settle_after_ten_samples_each():
    bins, _ = index(torch.rand(15), num_bins=4)
    bins.index(torch.rand(20))
    bins.index(torch.rand(20))  # five of these fill it up
    edges = bins.edges.clone()
    bins.index(100 + torch.rand(50))
    assert torch.equal(bins.edges, edges)
    assert bins.shard_state()["num_samples"] == 40


def test_zeros_and_ones_are_continuous_if_they_float():
    assert index(torch.tensor([0.0, 1.0]), num_bins=2)[0].continuous
    assert not index(torch.tensor([0, 1]))[0].continuous


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_times_are_refused(value):
    with pytest.raises(ValueError, match="`timesteps` expected finite numbers, but got NaN or infinity"):
        index(torch.tensor([0.5, value]))


@pytest.mark.parametrize(("value", "found"), [(1000, "1000"), (-1, "-1")])
def test_out_of_range(value, found):
    bins = TimestepBins(1000)
    with pytest.raises(ValueError, match=rf"values in \[0, 1000\), but got {found}. Set `num_timesteps`"):
        bins.inspect(torch.tensor([5, value]))
    timesteps = torch.tensor([5, value])
    assert bins.out_of_range(timesteps) == 1
    assert bins.index(timesteps).tolist() == [5, min(max(value, 0), 999)]
