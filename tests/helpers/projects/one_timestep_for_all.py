"""One timestep for the whole batch."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.projects.common import Style

REASON = r"`net` looks like it, but its argument `t` should hold one number for each of 8 rows, but is \(\)"


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(2, 2, 1).double()

    def forward(self, x, t):
        return self.body(x) * (1 + t)


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net = Embedded()

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0], torch.randint(4, ())), batch[0])
