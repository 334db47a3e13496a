"""One pass over images and class images, cut in two halves with a loss each."""

import torch
import torch.nn.functional as F

from tests.helpers.projects.common import Style, rows


class Project(Style):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        ours, prior = self.net(noisy, t).chunk(2)
        our_noise, prior_noise = noise.chunk(2)
        return F.mse_loss(ours, our_noise) + 0.5 * F.mse_loss(prior, prior_noise)


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.net(noisy, t) - noise) ** 2)
        ours, prior = losses.chunk(2)
        return self.bank.mean(torch.cat([2 * ours, 0.5 * 2 * prior]), losses, t)
