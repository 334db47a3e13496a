"""The denoiser returns a scalar to be minimised beside its output: it belongs to no sample."""

import torch.nn.functional as F
from torch import nn

from tests.helpers.projects.common import Net, Style

REASON = r"`net` looks like it, but it returns an output of shape \(\), which has no row for each of 8 samples"


class Balanced(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Net()

    def forward(self, x, t):
        out = self.body(x, t)
        return out, out.mean()


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net = Balanced()

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        out, balance = self.net(noisy, t)
        return F.mse_loss(out, noise) + balance
