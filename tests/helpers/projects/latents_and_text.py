"""Latent diffusion: a frozen autoencoder and text encoder inside the module, and a latent with sequences of tokens."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.projects.common import Net, Style, rows


class TextConditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.project = Net(), nn.Linear(3, 1, dtype=torch.float64)

    def forward(self, sample, timestep, encoder_hidden_states):
        return self.body(sample, timestep) + self.project(encoder_hidden_states.mean(1))[:, :, None, None]


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net = TextConditional()
        self.vae = nn.Conv2d(2, 2, 1).double().requires_grad_(False)
        self.text = nn.Embedding(10, 3).double().requires_grad_(False)

    def parts(self, batch):
        images, labels = batch
        with torch.no_grad():
            latents, text = self.vae(images), self.text(labels[:, None].expand(-1, 5))
        noisy, noise, t = self.noisy(latents)
        return self.net(noisy, t, text), noise, t

    def training_step(self, batch, batch_idx):
        predicted, noise, _ = self.parts(batch)
        return F.mse_loss(predicted.float(), noise.float())

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.05)


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        predicted, noise, t = self.parts(batch)
        losses = rows((predicted.float() - noise.float()) ** 2)
        return self.bank.mean(losses, losses, t)


TOLERANCE = 1e-6  # the project computes its loss in single precision
