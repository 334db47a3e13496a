"""Consistency training: neighbouring timesteps in one pass, compared with one another."""

import torch

from tests.helpers.projects.common import NUM_TIMESTEPS, Style

REASON = r"`net` looks like it, but rows at different timesteps share one loss, as in consistency training"


class Project(Style):
    def training_step(self, batch, batch_idx):
        noisy, _, t = self.noisy(batch[0])
        later, earlier = self.net(torch.cat([noisy, noisy]), torch.cat([t, (t + 1) % NUM_TIMESTEPS])).chunk(2)
        return (later - earlier).pow(2).mean()
