"""EDM: a preconditioned wrapper that gets sigma as its third argument, and a weighted loss for each sample."""

import torch
from torch import nn

from tests.helpers.projects.common import NUM_BINS, Net, Style, rows

AGC = {"num_bins": NUM_BINS}


class Precondition(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Net()

    def forward(self, x, labels, sigma):
        scale = 1 / (sigma**2 + 0.25).sqrt()
        return 0.25 * scale**2 * x + 0.5 * sigma * scale * self.model(scale * x, sigma.log().flatten() / 4)


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net = Precondition()

    def parts(self, batch):
        images, labels = batch
        sigma = (torch.randn(len(images), 1, 1, 1, dtype=torch.float64) * 1.2 - 1.2).exp()
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        denoised = self.net(images + sigma * torch.randn_like(images), labels, sigma)
        return denoised, images, sigma, weight

    def training_step(self, batch, batch_idx):
        denoised, images, _, weight = self.parts(batch)
        loss = weight * ((denoised - images) ** 2)
        return loss.mean(dim=(1, 2, 3)).mean()


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        denoised, images, sigma, weight = self.parts(batch)
        errors = (denoised - images) ** 2
        return self.bank.mean(rows(weight * errors), rows(errors), sigma, continuous=True)
