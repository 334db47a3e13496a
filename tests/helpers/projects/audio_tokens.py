"""Audio in channels-last sequences, and a criterion that gets the timesteps, too."""

import torch
from torch import nn

from tests.helpers.projects.common import NUM_TIMESTEPS, Style, rows


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, audio, diffusion_step):
        step = diffusion_step.reshape(-1, 1, 1).expand(-1, audio.shape[1], 1) / NUM_TIMESTEPS
        return self.mix(torch.cat([audio, step.double()], 2))


class Criterion(nn.Module):
    def forward(self, prediction, target, t):
        return (((prediction - target).pow(2)).flatten(1).mean(1) / (t + 1)).mean()


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net, self.criterion = Sequence(), Criterion()

    def noisy(self, x):
        noisy, noise, t = super().noisy(x)
        return noisy.flatten(2).mT, noise.flatten(2).mT, t

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        return self.criterion(self.net(noisy, t), noise, t)


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.net(noisy, t) - noise) ** 2)
        return self.bank.mean(losses / (t + 1), losses, t)
