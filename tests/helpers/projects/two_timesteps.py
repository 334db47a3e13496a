"""Two arguments hold a number per sample, and neither has a name that tells."""

import torch.nn.functional as F
from torch import nn

from tests.helpers.projects.common import Net, Style

REASON = r"`net` looks like it, but its arguments \['u', 'v'\] could each be the timestep"


class TwoNumbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Net()

    def forward(self, x, u, v):
        return self.body(x, u + v)


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net = TwoNumbers()

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        return F.mse_loss(self.net(noisy, t, t), noise)
