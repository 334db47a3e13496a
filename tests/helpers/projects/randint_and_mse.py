"""The timestep is drawn in the step, the loss is one number, and the step has no batch index."""

import torch.nn.functional as F

from tests.helpers.projects.common import Style, rows


class Project(Style):
    def training_step(self, batch):
        noisy, noise, t = self.noisy(batch[0])
        loss = F.mse_loss(self.net(noisy, t), noise)
        self.log("train_loss", loss)
        return loss


class ByHand(Project):
    def training_step(self, batch):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.net(noisy, t) - noise) ** 2)
        return self.bank.mean(losses, losses, t)
