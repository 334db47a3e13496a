"""A second call of the denoiser has a part in the loss that nobody can measure."""

import torch.nn.functional as F

from tests.helpers.projects.common import Style

REASON = r"the loss depends on 2 calls of `net`, not all of which could be measured"


class Project(Style):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        beside = self.net(batch[0], t).mean()
        return F.mse_loss(self.net(noisy, t), noise) + beside
