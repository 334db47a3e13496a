"""The denoiser is called without gradients, by checkpointing of the old kind."""

import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.helpers.projects.common import Style

REASON = r"`net` was called without gradients \(checkpointing of the old kind\?\)"


class Project(Style):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        return F.mse_loss(checkpoint(self.net, noisy.requires_grad_(), t, use_reentrant=True), noise)
