"""Outputs of a denoiser are followed past detach, scale and clamp: consistency training is told from other training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_iet.callbacks.anti_gradient_control.losses.error_capture import ErrorWatch, Origins
from tests.helpers.projects.common import Style
from tests.helpers.projects.training import fit, make

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
