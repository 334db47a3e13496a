"""The batch is doubled for classifier-free guidance: two rows of the output share a loss."""

import torch
import torch.nn.functional as F

from tests.helpers.projects.common import Style, rows


class Project(Style):
    def predict(self, noisy, t):
        conditional, unconditional = self.net(torch.cat([noisy, 0.5 * noisy]), torch.cat([t, t])).chunk(2)
        return unconditional + 1.5 * (conditional - unconditional)

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        return F.mse_loss(self.predict(noisy, t), noise)


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.predict(noisy, t) - noise) ** 2)
        return self.bank.mean(losses, losses, t)
