"""A diffusion object that is a module, gets images and timesteps, and returns the loss."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.projects.common import Net, Style, rows


class Diffusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Net()

    def forward(self, x_start, t, noise):
        return F.mse_loss(self.model(x_start + noise, t), noise)


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net = Diffusion()

    def training_step(self, batch, batch_idx):
        _, noise, t = self.noisy(batch[0])
        return self.net(batch[0], t, noise)


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        _, noise, t = self.noisy(batch[0])
        losses = rows(torch.square(self.net.model(batch[0] + noise, t) - noise))
        return self.bank.mean(losses, losses, t)
