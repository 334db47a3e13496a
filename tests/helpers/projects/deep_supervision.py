"""A denoiser with several outputs, each with a loss of its own, and a metric that is computed without gradients."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.projects.common import Net, Style, rows


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine, self.coarse = Net(), Net()

    def forward(self, x, t):
        return [self.fine(x, t), F.avg_pool2d(self.coarse(x, t), 2)]


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net = Pyramid()

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        fine, coarse = self.net(noisy, t)
        with torch.no_grad():
            self.log("mae", F.l1_loss(fine, noise))
        return F.mse_loss(fine, noise) + 0.3 * F.mse_loss(coarse, F.avg_pool2d(noise, 2))


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        fine, coarse = self.net(noisy, t)
        losses = rows((fine - noise) ** 2)
        return self.bank.mean(losses + 0.3 * rows((coarse - F.avg_pool2d(noise, 2)) ** 2), losses, t)
