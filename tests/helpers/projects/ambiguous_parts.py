"""Parts of the denoiser, and an encoder beside it, get several numbers per sample with names that tell nothing."""

import torch.nn.functional as F
from torch import nn

from tests.helpers.projects.common import Net, Style, rows


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Net()

    def forward(self, x, u, v):
        return self.body(x, u + 0 * v)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Part()

    def forward(self, x, t):
        return self.part(x, t, t.double())


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net, self.encoder = Whole(), Part()

    def predict(self, noisy, t):
        return self.net(noisy + self.encoder(noisy, t.double(), t.double()), t)

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        return F.mse_loss(self.predict(noisy, t), noise)


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.predict(noisy, t) - noise) ** 2)
        return self.bank.mean(losses, losses, t)
