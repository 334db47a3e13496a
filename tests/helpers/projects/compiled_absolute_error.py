"""An absolute error that is compiled: its gradient says nothing about its size."""

import torch

from tests.helpers.projects.common import Style

REASON = r"expected a squared error where it cannot see the loss itself, but got .* those of an absolute error"


class Project(Style):
    def __init__(self):
        super().__init__()
        self.loss = torch.compile(lambda a, b: (a - b).abs().mean(), backend="aot_eager")

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        return self.loss(self.net(noisy, t), noise)
