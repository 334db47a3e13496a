"""What is minimised does not depend on the denoiser that is called."""

import torch.nn.functional as F

from tests.helpers.projects.common import Net, Style

REASON = r"the loss does not depend on the output of `net`"


class Project(Style):
    def __init__(self):
        super().__init__()
        self.other = Net()

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        F.mse_loss(self.net(noisy, t), noise)
        return self.other.inner.weight.sum()
