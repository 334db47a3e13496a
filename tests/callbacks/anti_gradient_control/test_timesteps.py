"""Timesteps of every kind find their bins; sums of training and unseen losses over time, and what is told of them."""

import pytest
import torch
from torch.testing import assert_close

from lightning_iet.callbacks.anti_gradient_control.reference import module_state
from lightning_iet.callbacks.anti_gradient_control.timesteps import (
    GapHistory,
    TimestepBins,
    TimestepStatistics,
    gap_metrics,
)
from lightning_iet.plots import loss_gap


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


def epoch(number):
    statistics = TimestepStatistics(20)
    losses, timesteps = torch.full((6,), 1.0 + number), torch.tensor([0, 0, 1, 5, 19, 19])
    statistics.update(losses, timesteps, keep=torch.tensor([True, False, True, True, False, False]))
    statistics.update_unseen(torch.full((3,), 2.0 + 2 * number), torch.tensor([1, 4, 18]))
    return statistics


def test_bands_by_hand():
    history = GapHistory()
    history.add(epoch(0))
    history.add(epoch(1))
    means, nan = history.means(), torch.nan
    assert_close(means["training_loss"][1], torch.tensor([2, nan, 2, *[nan] * 6, 2]).double(), equal_nan=True)
    assert_close(means["unseen_loss"][1], torch.tensor([4, nan, 4, *[nan] * 6, 4]).double(), equal_nan=True)
    assert_close(means["skip_rate"][1], torch.tensor([1 / 3, nan, 0, *[nan] * 6, 1]).double(), equal_nan=True)
    assert_close(history.gap(2).nanmean().item(), 0.5)
    last = GapHistory()
    last.add(epoch(1))
    gap, by_bin = gap_metrics(last)
    assert gap == 0.5
    assert by_bin.keys() == {f"{name}/bin_{n}" for name in means for n in (0, 2, 9)}
    assert by_bin["training_loss/bin_9"] == 2
    nothing = GapHistory()
    nothing.add(TimestepStatistics(20))
    assert gap_metrics(nothing) == (None, {})


@pytest.mark.parametrize("epochs", [127, 128, 131, 300])
def test_long_runs_take_no_more_room(epochs):
    history, total = GapHistory(), 0
    for number in range(epochs):
        history.add(epoch(number))
        total = total + epoch(number).by_timestep(["loss_sum"], 10)
        if number == 130:  # a checkpoint in the middle
            state, history = history.state_dict(), GapHistory()
            history.load_state_dict(state)
    assert len(history.rows) < 128
    assert history.width == {127: 1, 128: 2, 131: 2, 300: 4}[epochs]
    assert len(history.rows) == -(-epochs // history.width)
    assert_close(history.rows[:, 1].sum(0), total[0])


@pytest.mark.parametrize("epochs", [1, 2, 60])
def test_a_picture(epochs):
    history = GapHistory()
    for number in range(epochs):
        history.add(epoch(number))
    figure = loss_gap(**history.means(), epochs_per_row=history.width, num_timesteps=20)
    losses, ratios, skips, _ = figure.axes
    assert [len(line.get_xdata()) for line in losses.lines] == [epochs, epochs]
    assert (skips.lines[0].get_ydata() <= 1).all()
    assert ratios.images[0].get_array().shape == (10, epochs)
    figure.canvas.draw()
    without = loss_gap(**history.means() | {"skip_rate": torch.zeros(epochs, 10)})
    assert len(without.axes) == 3


def test_a_state_tells_what_has_changed():
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.arange(4.0))
    module.queue, module.halves = torch.arange(4), torch.ones(2, dtype=torch.bfloat16)
    module.generator, module.sobol = torch.Generator(), torch.quasirandom.SobolEngine(1)
    module.names, module.nested, module.function = ["a"], {"a": [1, {2}]}, len
    module.inner = torch.nn.Linear(1, 1)

    def changed(change):
        before = module_state(module)
        change()
        after = module_state(module)
        return [name for name in after if before.get(name) != after[name]]

    assert changed(lambda: None) == []
    assert changed(lambda: module.weight.data.mul_(2)) == ["weight"]
    assert changed(lambda: setattr(module, "queue", module.queue.roll(1))) == ["queue"]
    assert changed(lambda: torch.rand(1, generator=module.generator)) == ["generator"]
    assert changed(lambda: module.sobol.draw(1)) == ["sobol"]
    assert changed(lambda: module.nested["a"].append(3)) == ["nested"]
    assert changed(lambda: module.inner.bias.data.add_(1)) == ["inner.bias"]
    assert changed(lambda: setattr(module, "new", 1)) == ["new"]
