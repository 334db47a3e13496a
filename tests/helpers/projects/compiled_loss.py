"""The loss is compiled: nobody sees a squared error, and its gradient stands in for it."""

import torch

from tests.helpers.projects.common import Style, rows


class Project(Style):
    def __init__(self):
        super().__init__()
        self.loss = torch.compile(lambda a, b: ((a - b) ** 2).mean(), backend="aot_eager")

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        return self.loss(self.net(noisy, t), noise)


class ByHand(Style):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.net(noisy, t) - noise) ** 2)
        return self.bank.mean(losses, losses, t)
