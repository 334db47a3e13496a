"""What the styles share: a small denoiser, data, and AGC as a loop over samples."""

import lightning.pytorch as pl
import torch
from torch import nn

NUM_TIMESTEPS = 4
NUM_BINS = 5
THRESHOLD = 0.95


class Net(nn.Module):
    """A denoiser f(x, t)."""

    def __init__(self, channels=2, out_channels=None):
        super().__init__()
        self.inner = nn.Linear(16 * channels + 1, 12, dtype=torch.float64)
        self.outer = nn.Linear(12, 16 * (out_channels or channels), dtype=torch.float64)

    def forward(self, x, t):
        hidden = torch.cat([x.flatten(1), t.reshape(-1, 1).double() / NUM_TIMESTEPS], 1)
        return self.outer(torch.tanh(self.inner(hidden))).reshape(len(x), -1, 4, 4)


class Style(pl.LightningModule):
    """Batches are (images, labels)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = Net()
        self.bank = Bank()

    def noisy(self, x):
        """A noisy batch, its noise, and its timesteps."""
        t = torch.randint(NUM_TIMESTEPS, (len(x),))
        noise = torch.randn_like(x)
        return x + (t + 1).reshape(-1, 1, 1, 1) / NUM_TIMESTEPS * noise, noise, t

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Bank:
    """AGC as METHODS has it: one sample after the other."""

    def __init__(self):
        self.means, self.samples, self.skipped = {}, [], 0

    def keep(self, losses, timesteps, continuous=False):
        """Which samples of a batch stay in the loss, as a list."""
        places = timesteps.tolist()
        if continuous:
            places = self.bins(timesteps)
        kept = [
            loss >= THRESHOLD * self.means.get(place, 0.0) for loss, place in zip(losses.tolist(), places, strict=True)
        ]
        for loss, place in zip(losses.tolist(), places, strict=True):
            self.means[place] = 0.8 * self.means.get(place, 0.0) + 0.2 * loss
        self.skipped += len(kept) - sum(kept)
        return kept

    def bins(self, timesteps):
        """Equal-probability bins of all timesteps so far, up to ten per bin."""
        self.samples += timesteps.float().tolist()
        ordered = sorted(self.samples[: 10 * NUM_BINS])
        edges = []
        for i in range(1, NUM_BINS):
            whole, rest = divmod(i * (len(ordered) - 1), NUM_BINS)
            above = ordered[min(whole + 1, len(ordered) - 1)]
            edges.append(ordered[whole] + (above - ordered[whole]) * rest / NUM_BINS)
        return [sum(value >= edge for edge in edges) for value in timesteps.float().tolist()]

    def mean(self, losses, measured, timesteps, continuous=False):
        """The mean of the losses that are kept, judged by what is measured; both (B,)."""
        kept = self.keep(measured.detach(), timesteps.flatten(), continuous)
        chosen = [loss for loss, keep in zip(losses, kept, strict=True) if keep]
        return sum(chosen) / len(chosen) if chosen else 0 * losses.sum()


def rows(errors):
    """The mean over everything but the first axis."""
    return errors.flatten(1).mean(1)
