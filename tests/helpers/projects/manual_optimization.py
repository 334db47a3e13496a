"""The step takes its optimizer steps itself."""

import torch.nn.functional as F

from tests.helpers.projects.common import Style, rows


class Project(Style):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def loss(self, batch):
        noisy, noise, t = self.noisy(batch[0])
        return F.mse_loss(self.net(noisy, t), noise)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class ByHand(Project):
    def loss(self, batch):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.net(noisy, t) - noise) ** 2)
        return self.bank.mean(losses, losses, t)
