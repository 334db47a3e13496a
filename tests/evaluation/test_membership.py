import dataclasses

import pytest
import torch

from lightning_iet.evaluation.membership import infer_membership


def random_losses(count, *, shift=0.0, seed=0):
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) + shift


def test_figures_equal_a_naive_count():
    train, held_out = random_losses(30, seed=0), random_losses(200, shift=0.2, seed=1)
    found = infer_membership(train, held_out, torch.tensor([10, 50, 90]))
    members, others = (sorted(sum(row) / 3 for row in losses.tolist()) for losses in (train, held_out))
    assert found.auc == pytest.approx(sum(m < o for m in members for o in others) / 6000)
    assert found.auc_low < found.auc < found.auc_high
    assert found.true_positive_rates["0.01"] == pytest.approx(sum(m < others[2] for m in members) / 30)
    assert found.true_positive_rates["0.001"] == pytest.approx(sum(m < others[0] for m in members) / 30)
    assert (found.train, found.held_out) == (30, 200)


def test_the_gap_of_each_timestep_and_its_interval():
    train, held_out = random_losses(300, seed=0), random_losses(500, shift=0.2, seed=1)
    for column, gap in enumerate(infer_membership(train, held_out, torch.tensor([10, 50, 90])).timesteps):
        means, variances = [], []
        for losses in (train[:, column].tolist(), held_out[:, column].tolist()):
            means.append(sum(losses) / len(losses))
            variances.append(sum((loss - means[-1]) ** 2 for loss in losses) / (len(losses) - 1) / len(losses))
        half = 1.963 * sum(variances) ** 0.5  # of Student's distribution with about 640 degrees of freedom
        assert gap.timestep == (10, 50, 90)[column]
        assert (gap.train, gap.held_out) == pytest.approx(means)
        assert gap.gap == pytest.approx(means[1] - means[0])
        assert (gap.low, gap.high) == pytest.approx((gap.gap - half, gap.gap + half), abs=1e-4)


def test_the_interval_covers_no_gap_in_95_of_100_trials():
    covered = 0
    for seed in range(200):
        (gap, *_) = infer_membership(
            random_losses(20, seed=2 * seed), random_losses(50, seed=2 * seed + 1), torch.arange(3)
        ).timesteps
        covered += gap.low < 0 < gap.high
    assert 180 <= covered <= 199


def test_all_figures_are_plain_numbers():
    found = dataclasses.asdict(infer_membership(random_losses(4), random_losses(5, seed=1), torch.tensor([1, 2, 3])))
    assert found.pop("labels_given") is None
    numbers = [value for value in found.values() if not isinstance(value, list | dict)]
    numbers += [value for gap in found["timesteps"] for value in gap.values()]
    assert all(type(number) in (int, float) for number in numbers)


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        (torch.zeros(1, 2), torch.zeros(3, 2), "Argument `train` expected at least 2 images"),
        (torch.zeros(3, 2), torch.zeros(1, 2), "Argument `held_out` expected at least 2 images"),
        (torch.tensor([[1.0], [torch.nan]]), torch.ones(2, 1), "Argument `train` expected images with a finite loss"),
    ],
)
def test_losses_that_say_nothing_are_refused(train, held_out, message):
    with pytest.raises(ValueError, match=message):
        infer_membership(train, held_out, torch.arange(train.shape[1]))
