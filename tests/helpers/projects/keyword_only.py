"""The denoiser takes keywords only, timesteps come from numpy, and the step returns a dict."""

import numpy as np
import torch
from torch import nn

from tests.helpers.projects.common import NUM_TIMESTEPS, Net, Style, rows


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Net()

    def forward(self, *, sample, timestep, return_dict=True):
        out = self.body(sample, timestep)
        return {"sample": out} if return_dict else (out,)


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net = Keywords()
        self.generator = np.random.default_rng(0)

    def noisy(self, x):
        _, noise, _ = super().noisy(x)
        t = torch.from_numpy(self.generator.integers(NUM_TIMESTEPS, size=len(x)))
        return x + noise, noise, t

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        difference = self.net(sample=noisy, timestep=t)["sample"] - noise
        return {"loss": (difference * difference).mean(), "steps": t}


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.net(sample=noisy, timestep=t, return_dict=False)[0] - noise) ** 2)
        return {"loss": self.bank.mean(losses, losses, t)}
