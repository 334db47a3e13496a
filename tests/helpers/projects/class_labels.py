"""Class labels are a second number per sample, and both arguments have unusual names."""

import torch.nn.functional as F
from torch import nn

from tests.helpers.projects.common import Net, Style, rows


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.bias = Net(), nn.Embedding(10, 1).double()

    def forward(self, img, y, moment):
        return self.body(img, moment) + self.bias(y)[:, :, None, None]


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net = Conditional()

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        return F.mse_loss(self.net(noisy, batch[1], t), noise)


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.net(noisy, batch[1], t) - noise) ** 2)
        return self.bank.mean(losses, losses, t)
