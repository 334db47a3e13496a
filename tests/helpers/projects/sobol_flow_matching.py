"""Flow matching: quasi-random times in [0, 1], and an absolute error in place of a squared one."""

import torch

from tests.helpers.projects.common import NUM_BINS, Style, rows

AGC = {"num_bins": NUM_BINS}


class Project(Style):
    def __init__(self):
        super().__init__()
        self.sobol = torch.quasirandom.SobolEngine(1, scramble=True, seed=0)

    def velocity(self, images):
        time = self.sobol.draw(len(images), dtype=torch.float64)
        noise = torch.randn_like(images)
        place = time.reshape(-1, 1, 1, 1)
        return self.net((1 - place) * noise + place * images, time), images - noise, time

    def training_step(self, batch, batch_idx):
        predicted, target, _ = self.velocity(batch[0])
        return (predicted - target).abs().mean()


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        predicted, target, time = self.velocity(batch[0])
        losses = rows((predicted - target).abs())
        return self.bank.mean(losses, losses, time, continuous=True)
