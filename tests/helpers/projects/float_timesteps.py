"""A flow's time in [0, 1], turned round and given to the denoiser as t · 1000."""

import torch
import torch.nn.functional as F

from tests.helpers.projects.common import NUM_BINS, Style, rows

AGC = {"num_bins": NUM_BINS}


class Project(Style):
    def velocity(self, images):
        time = torch.sigmoid(torch.randn(len(images), dtype=torch.float64))
        noise = torch.randn_like(images)
        place = time.reshape(-1, 1, 1, 1)
        return self.net(place * noise + (1 - place) * images, (1 - time) * 1000), noise - images, (1 - time) * 1000

    def training_step(self, batch, batch_idx):
        predicted, target, _ = self.velocity(batch[0])
        return F.smooth_l1_loss(predicted, target, beta=0.5)


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        predicted, target, time = self.velocity(batch[0])
        losses = rows(F.smooth_l1_loss(predicted, target, beta=0.5, reduction="none"))
        return self.bank.mean(losses, losses, time, continuous=True)
