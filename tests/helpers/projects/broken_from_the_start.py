"""The loss is NaN before anything was learnt."""

import torch.nn.functional as F

from tests.helpers.projects.common import Style

REASON = r"its losses \(`mse_loss`\) are NaN or infinite before anything was learnt: look at data and weights"


class Project(Style):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        return F.mse_loss(self.net(noisy, t), noise * float("nan"))
