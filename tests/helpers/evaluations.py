"""A module that copies training images, and runs of it with an evaluation."""

import csv

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import Subset

from lightning_iet import DigitsDataModule
from tests.helpers.models import quiet_trainer


class Copier(pl.LightningModule):
    """Learns next to nothing; every second image that it draws is a training image with some noise."""

    num_timesteps = 1000

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(64, 4), nn.Dropout(0.5), nn.Linear(4, 64))
        self.draws = []  # (start, number) of each call
        self.shown = []  # first weights at each call

    def training_step(self, batch, batch_idx):
        x = batch[0].flatten(1)
        losses = (self.net(x) - torch.randn_like(x)).square().mean(1)
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": torch.randint(self.num_timesteps, (len(x),))}

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)

    def sample(self, num, *, seed=0, start=0, batch_size=256, sampler="ddim", num_inference_steps=50, use_ema=True):
        self.eval()  # and left so: whoever asks has to put it back
        torch.rand(7)  # likewise
        self.draws.append((start, num))
        self.shown.append(self.net[0].weight.detach().clone())
        return torch.cat([self.image(seed, start + i) for i in range(num)])

    def image(self, seed, i):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        noise = torch.rand(1, 1, 8, 8, generator=generator)
        original = self.trainer.datamodule.train_set[i % len(self.trainer.datamodule.train_set)][0]
        return (0.95 * original + 0.05 * noise) if i % 2 else noise


class Untrained(Copier):
    def training_step(self, batch, batch_idx):
        raise AssertionError("training has started")


class FewDigits(DigitsDataModule):
    """Digits of which few are the reference: features of all others would take most of an evaluation's time."""

    def setup(self, stage):
        super().setup(stage)
        self.reference_set = Subset(self.reference_set, range(200))


def fit(tmp_path, evaluation=None, *, module=None, data=None, callbacks=(), trainer=None, ckpt_path=None):
    settings = {"callbacks": [*([evaluation] if evaluation else []), *callbacks], "num_sanity_val_steps": 0}
    module = module or Copier()
    trainer = quiet_trainer(tmp_path, **(settings | {"limit_val_batches": 0} | (trainer or {})))
    torch.manual_seed(5)
    trainer.fit(module, datamodule=data or FewDigits(64, num_control=100, batch_size=32), ckpt_path=ckpt_path)
    return trainer, module


def images_of(dataset):
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


def rows_of(logger):
    with open(logger.experiment.metrics_file_path, newline="") as file:
        return list(csv.DictReader(file))
