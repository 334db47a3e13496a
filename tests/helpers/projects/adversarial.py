"""Adversarial phases, each with an optimizer of its own."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.projects.common import Style

REASON = r"it has several optimizers, and which of them trains the denoiser cannot be told"


class Project(Style):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(32, 1).double()

    def training_step(self, batch, batch_idx):
        noisy, _, t = self.noisy(batch[0])
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(F.softplus(-self.critic(self.net(noisy, t).flatten(1))).mean())
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.critic)]
