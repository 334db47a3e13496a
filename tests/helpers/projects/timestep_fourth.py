"""The timestep comes fourth, after a condition, a mask and labels."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.projects.common import Net, Style, rows


class TimeFourth(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Net()

    def forward(self, x, context, labels, ts):
        return self.body(x + context, ts)


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net = TimeFourth()

    def predict(self, noisy, batch, t):
        return self.net(noisy, torch.ones_like(noisy), batch[1], t)

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        return F.mse_loss(self.predict(noisy, batch, t), noise)


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.predict(noisy, batch, t) - noise) ** 2)
        return self.bank.mean(losses, losses, t)
