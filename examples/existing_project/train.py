"""A diffusion project as many people write it: DDPM on handwritten digits, with Lightning.

    python train.py --epochs 20

It knows nothing of lightning_iet. ``agc.diff`` shows the two lines that bring anti-gradient control to it.
"""

import argparse
import math

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class ResBlock(nn.Module):
    """Two convolutions, told the time in between."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.time = nn.Linear(128, out_channels)
        self.second = nn.Sequential(
            nn.GroupNorm(8, out_channels), nn.SiLU(), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        )
        self.skip = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        h = self.first(x) + self.time(emb)[:, :, None, None]
        return self.second(h) + self.skip(x)


class UNet(nn.Module):
    """A small U-Net with one level."""

    def __init__(self, width=32):
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128))
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.down = ResBlock(width, width)
        self.middle = ResBlock(width, 2 * width)
        self.up = ResBlock(3 * width, width)
        self.out = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x, time):
        frequencies = torch.exp(-math.log(10000) * torch.arange(32, device=x.device) / 32)
        angles = time[:, None] * frequencies
        emb = self.time_mlp(torch.cat([angles.sin(), angles.cos()], dim=1))
        high = self.down(self.stem(x), emb)
        low = self.middle(F.avg_pool2d(high, 2), emb)
        return self.out(self.up(torch.cat([high, F.interpolate(low, scale_factor=2)], dim=1), emb))


class DDPM(L.LightningModule):
    """Predicts the noise (Ho et al., 2020)."""

    def __init__(self, lr=1e-3, timesteps=1000):
        super().__init__()
        self.save_hyperparameters()
        self.model = UNet()
        alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, timesteps)).cumprod(0)
        self.register_buffer("sqrt_alphas_cumprod", alphas_cumprod.sqrt())
        self.register_buffer("sqrt_one_minus_alphas_cumprod", (1 - alphas_cumprod).sqrt())

    def q_sample(self, x_start, t, noise):
        signal = self.sqrt_alphas_cumprod[t][:, None, None, None]
        return signal * x_start + self.sqrt_one_minus_alphas_cumprod[t][:, None, None, None] * noise

    def p_losses(self, x_start, t):
        noise = torch.randn_like(x_start)
        predicted = self.model(self.q_sample(x_start, t, noise), t)
        return F.mse_loss(predicted, noise)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        t = torch.randint(0, self.hparams.timesteps, (x.shape[0],), device=self.device)
        loss = self.p_losses(x, t)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class Digits(L.LightningDataModule):
    """Handwritten digits in [-1, 1]."""

    def __init__(self, batch_size=64):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        self.train = TensorDataset(images, torch.tensor(digits.target))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)


def main(args=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args(args)
    L.seed_everything(0)
    trainer = L.Trainer(max_epochs=args.epochs)
    trainer.fit(DDPM(), Digits())
    return trainer


if __name__ == "__main__":
    main()
