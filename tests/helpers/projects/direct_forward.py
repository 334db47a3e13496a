"""The denoiser is a wrapper whose ``forward`` is called directly: only the net inside it is called as a module."""

from torch import nn

from tests.helpers.projects.common import Net, Style, rows


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.unet = Net()

    def forward(self, x, t):
        return self.unet(x, t)


class Project(Style):
    def __init__(self):
        super().__init__()
        self.net = Wrapper()
        self.loss = nn.MSELoss()

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        return self.loss(self.net.forward(noisy, t), noise)


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.net.forward(noisy, t) - noise) ** 2)
        return self.bank.mean(losses, losses, t)
