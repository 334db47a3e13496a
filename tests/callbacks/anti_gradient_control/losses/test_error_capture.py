"""The test of the first batch: which row of an output each loss depends on."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_iet.callbacks.anti_gradient_control.losses.error_capture import (
    ErrorWatch,
    Layout,
    Origins,
    layouts,
    row_maps,
    tensors_in,
)
from tests.helpers.projects.common import Style
from tests.helpers.projects.training import fit, make


def map_by_hand(losses, output):
    """One backward pass per loss."""
    found = torch.full((len(output),), -1)
    for number, loss in enumerate(losses):
        (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
        for row in gradient.flatten(1).ne(0).any(1).nonzero().flatten().tolist():
            if found[row] >= 0:
                return None
            found[row] = number
    return found


def assert_map(rows, output):
    expected, found = map_by_hand(rows.sum(1), output), row_maps(rows, [[output]])
    if expected is None:
        assert found is None
    else:
        assert torch.equal(found[0], expected)


@given(owners=st.lists(st.integers(0, 8), min_size=1, max_size=20))
def test_any_map_is_told(owners):
    """Row j is added into loss owners[j]; what belongs to loss 8 is left out."""
    output = torch.randn(len(owners), 3, dtype=torch.float64, requires_grad=True)
    rows = torch.zeros(9, 3, dtype=torch.float64).index_add(0, torch.tensor(owners), output)[:8] ** 2
    assert_map(rows, output)


@given(
    owners=st.lists(st.integers(0, 6), min_size=2, max_size=12),
    extra=st.tuples(st.integers(0, 11), st.integers(0, 6)),
    size=st.sampled_from([1.0, 1e-3, -1.0]),
)
def test_a_second_owner_is_found_out(owners, extra, size):
    row, owner = extra[0] % len(owners), extra[1]
    output = torch.randn(len(owners), 3, dtype=torch.float64, requires_grad=True)
    rows = torch.zeros(7, 3, dtype=torch.float64).index_add(0, torch.tensor(owners), output)
    rows = rows.index_add(0, torch.tensor([owner]), size * output[row : row + 1].flip(1)) ** 2
    assert_map(rows, output)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_every_precision(dtype, batch_size):
    output = torch.randn(batch_size, 3, 8, 8).to(dtype).requires_grad_()
    error = (output - torch.randn_like(output)) ** 2
    (found,) = row_maps(error.flatten(1), [[output]])
    assert torch.equal(found, torch.arange(batch_size))
    if batch_size > 1:
        assert row_maps((error / error.mean()).flatten(1), [[output]]) is None
        assert row_maps(((output - output.mean(0)) ** 2).flatten(1), [[output]]) is None


def test_several_outputs_and_calls():
    first, second, third = (torch.randn(4, 2, requires_grad=True) for _ in range(3))
    rows = (first + second.flip(0)) ** 2 + third.roll(1, 0)
    assert [found.tolist() for found in row_maps(rows, [[first], [second]])] == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert row_maps(rows, [[first, second]]) is None


def test_broken_rows_tell_nothing():
    output = torch.ones(3, 2, requires_grad=True)
    rows = output**2 * torch.tensor([[1.0], [float("nan")], [0.0]])
    assert row_maps(rows, [[output]])[0].tolist() == [0, -1, -1]


@pytest.mark.parametrize(
    ("arrange", "layout"),
    [
        (lambda x: x, Layout(0)),
        (lambda x: x.permute(0, 2, 3, 1).reshape(-1, 2), Layout(0)),
        (lambda x: x.movedim(0, 1), Layout(1)),
        (lambda x: x.flatten(1).mT, Layout(1)),
        (lambda x: x.permute(2, 3, 0, 1).reshape(-1, 2), Layout(0, major=False)),
        (lambda x: x[:3], Layout(whole=False)),
    ],
)
def test_layouts(arrange, layout):
    output = torch.randn(6, 2, 5, 5, requires_grad=True)
    errors = arrange(output**2)
    tried = [each for each in layouts(errors, 6) if row_maps(each.rows(errors, 6), [[output]]) is not None]
    assert tried[0] == layout
    rows = layout.rows(errors, 6)
    torch.testing.assert_close(rows.sum(1), (output**2).sum((1, 2, 3))[: len(rows)])


COMPARED = "its output is compared with another output of a denoiser, as in consistency training"


class Teacher(Style):
    """A copy of the denoiser makes the target."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def target(self, noisy, t):
        with torch.no_grad():
            return (0.9 * self.teacher(noisy, t - 1) + 0.1 * noisy).clamp(-1, 1)

    def training_step(self, batch, batch_idx):
        noisy, _, t = self.noisy(batch[0])
        target = self.target(noisy, t)
        return F.mse_loss(self.net(noisy, t), target)


class TeacherAfterwards(Teacher):
    def training_step(self, batch, batch_idx):
        noisy, _, t = self.noisy(batch[0])
        prediction = self.net(noisy, t)
        skip = 1 / (t + 1.0)[:, None, None, None]
        error = (skip * noisy + (1 - skip) * prediction) - self.target(noisy, t)
        return (error.pow(2) + 1e-6).sqrt().mean()


class WithGradientsOn(Teacher):
    def target(self, noisy, t):
        return torch.tanh(self.teacher(noisy, t - 1))


class StopGradient(Style):
    """The denoiser itself, one step on, with its gradient stopped."""

    def training_step(self, batch, batch_idx):
        noisy, _, t = self.noisy(batch[0])
        target = self.net(noisy, t - 1).detach()
        target = target / target.abs().amax((1, 2, 3), keepdim=True)
        return F.huber_loss(self.net(noisy, t), target)


class Data(Style):
    def training_step(self, batch, batch_idx):
        noisy, _, t = self.noisy(batch[0])
        return (self.net(noisy, t) - 2 * self.net(noisy, t - 1).data).square().mean()


class InPlace(Teacher):
    def target(self, noisy, t):
        target = torch.zeros_like(noisy)
        target[:, :] = super().target(noisy, t)
        return torch.stack([target, noisy]).mul_(2)[0].add_(1)


@pytest.mark.parametrize("style", [Teacher, TeacherAfterwards, WithGradientsOn, StopGradient, Data, InPlace])
def test_consistency_training_is_refused(tmp_path, style):
    with pytest.raises(ValueError, match=COMPARED):
        fit(tmp_path, style(), make(style))


class Residual(Style):
    """Self-conditioning, an error for the log against the estimate, weights from the loss itself: no target."""

    def __init__(self):
        super().__init__()
        self.blur = Blur()

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(self.blur(batch[0], torch.zeros(len(batch[0]))))
        with torch.no_grad():
            estimate = self.net(noisy, t).clamp(-1, 1)
        prediction = self.net(noisy + 0.1 * estimate, t)
        self.log("agreement", F.mse_loss(prediction, estimate))
        error = (noisy - prediction - noise) ** 2
        weight = 1 / (error.detach().mean((1, 2, 3), keepdim=True) + 1)
        return (weight * error).mean()


class Blur(nn.Module):
    """A fixed operator with a few weights, called with a batch and a number for each row."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Conv2d(2, 2, 3, padding=1).double().requires_grad_(False)

    def forward(self, x, strength):
        return self.kernel(x) * (1 + strength[:, None, None, None])


def test_other_uses_of_estimates_are_not_refused(tmp_path):
    agc = make(Residual)
    fit(tmp_path, Residual(), agc)
    assert agc.skip_rate() > 0.05


def test_denoiser_named_the_message_says_what_is_left_to_do(tmp_path):
    style = type("Named", (StopGradient,), {"AGC": {"denoiser": "net"}})
    message = "expected to read the losses of `net` in Named, but its output is compared"
    with pytest.raises(ValueError, match=message) as caught:
        fit(tmp_path, style(), make(style))
    assert "Name it" not in str(caught.value)
    assert str(caught.value).count('Let training_step return {"loss", "sample_loss", "timesteps"}; or reduce') == 1


def test_marks_go_the_way_of_values_and_gradients():
    student, teacher = nn.Identity(), nn.Linear(1, 1)
    origins = Origins()
    watch = ErrorWatch(lambda error: None, origins.follow)
    made, target = torch.ones(4, 2, requires_grad=True), torch.zeros(4, 2)
    assert not origins
    origins.add(student, [made])
    origins.add(teacher, [target])
    watch.start()
    try:
        left, right = (3 * target).clamp(-1, 1).chunk(2)
        joined = torch.cat([left, right])
        through, past = made * 2, made.detach() + 1
        own = made - past
        with torch.no_grad():
            hidden = made * 3
        other = torch.ones(4, 2) * 2
    finally:
        watch.stop()
    assert origins.foreign(joined) == [teacher]
    assert origins.foreign(through) == origins.foreign(other) == origins.foreign(own) == []
    assert origins.foreign(past) == origins.foreign(hidden) == [student]
    origins.clear()
    assert origins.foreign(joined) == []


@dataclass
class Batch:
    images: torch.Tensor
    parent: object = None
    drawn: torch.Tensor = field(init=False)


def test_tensors_in_batches_that_are_unfinished_or_circular():
    images = torch.zeros(4, 2)
    batch = Batch(images)
    assert [tensor is images for tensor in tensors_in({"batch": [batch]})] == [True]
    batch.parent = {"of": [batch]}
    assert {id(tensor) for tensor in tensors_in(batch)} == {id(images)}
    assert list(tensors_in([[images]], depth=2)) == [images]
    assert list(tensors_in([[images]], depth=1)) == []


def test_marks_are_looked_for_in_lists_of_arguments_and_no_deeper():
    teacher, origins = nn.Linear(1, 1), Origins()
    target = torch.zeros(1)
    origins.add(teacher, [target])
    shallow, deep = torch.zeros(1), torch.zeros(1)
    origins.follow(torch.cat, ([target],), {}, shallow)
    origins.follow(torch.cat, ([[target]],), {}, deep)
    assert origins.foreign(shallow) == [teacher]
    assert origins.foreign(deep) == []
