"""Nothing is called with a timestep."""

from torch import nn

from tests.helpers.projects.common import Style

REASON = r"find the denoiser of Project, but no module was called with gradients on, a batch .* Name it, .*denoiser="


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(2, 2, 1).double()

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[0]).square().mean()
