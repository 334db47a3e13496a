"""Two denoisers train in one step."""

import torch.nn.functional as F

from tests.helpers.projects.common import Net, Style

REASON = r"there are 2 candidates, \['net', 'other'\]"


class Project(Style):
    def __init__(self):
        super().__init__()
        self.other = Net()

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        return F.mse_loss(self.net(noisy, t), noise) + F.mse_loss(self.other(noisy, t), batch[0])
