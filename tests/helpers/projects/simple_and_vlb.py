"""A loss per sample that is used twice, with a learned variance, and means that are only logged beside it."""

import torch
from torch import nn

from tests.helpers.projects.common import NUM_TIMESTEPS, Style, rows


class Project(Style):
    def __init__(self):
        super().__init__()
        self.logvar = nn.Parameter(torch.zeros(NUM_TIMESTEPS, dtype=torch.float64))

    def terms(self, simple, t):
        gamma = simple / self.logvar[t].exp() + self.logvar[t]
        vlb = (t + 1) * simple
        return gamma, vlb

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        simple = torch.nn.functional.mse_loss(self.net(noisy, t), noise, reduction="none").mean([1, 2, 3])
        gamma, vlb = self.terms(simple, t)
        self.log_dict({"loss_simple": simple.mean(), "loss_vlb": vlb.mean(), "logvar": self.logvar.mean()})
        return gamma.mean() + 0.01 * vlb.mean()


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        output = self.net(noisy, t)
        kept = torch.tensor(self.bank.keep(rows((output.detach() - noise) ** 2), t))
        # What is left out has no gradient through the denoiser; its learned variance goes on.
        output = torch.where(kept.reshape(-1, 1, 1, 1), output, output.detach())
        scale = len(kept) / kept.sum().clamp(min=1)
        output = output.detach() + scale * (output - output.detach())
        gamma, vlb = self.terms(rows((output - noise) ** 2), t)
        return gamma.mean() + 0.01 * vlb.mean()
