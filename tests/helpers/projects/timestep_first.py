"""The timestep comes first."""

import torch.nn.functional as F
from torch import nn

from tests.helpers.projects.common import Net, Style, rows


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Net()

    def forward(self, *args):
        time, x = args
        return self.body(x, time)


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net = TimeFirst()

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        return F.mse_loss(self.net(t, noisy), noise)


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.net(t, noisy) - noise) ** 2)
        return self.bank.mean(losses, losses, t)
