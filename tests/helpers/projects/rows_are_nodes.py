"""Rows are the nodes of graphs, each with its graph's timestep."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.projects.common import Net, Style

REASON = r"`net` looks like it, but its argument `edge_index` says that rows are nodes of graphs, not samples"


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Net()

    def forward(self, x, t, edge_index):
        return self.body(x, t)[edge_index[0]]


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net = GraphNet()

    def training_step(self, batch, batch_idx):
        noisy, noise, _ = self.noisy(batch[0])
        t = torch.arange(len(noisy)) // 2
        return F.mse_loss(self.net(noisy, t, torch.arange(len(noisy)).expand(2, -1)), noise)
