"""The loss is computed on some of the rows of the output."""

import torch.nn.functional as F

from tests.helpers.projects.common import Style

REASON = r"`net` looks like it, but only 5 of its 8 rows have a loss"


class Project(Style):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        return F.mse_loss(self.net(noisy, t)[:5], noise[:5])
