"""The batch is the faster part of a merged axis."""

import torch.nn.functional as F
from einops import rearrange

from tests.helpers.projects.common import Style, rows


class Project(Style):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        columns = [rearrange(images, "b c h w -> c (h w b)") for images in (self.net(noisy, t), noise)]
        return F.mse_loss(*columns)


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.net(noisy, t) - noise) ** 2)
        return self.bank.mean(losses, losses, t)
