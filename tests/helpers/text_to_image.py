"""Tiny text-to-image pipelines and captioned images for tests."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_iet.modules import TextToImageModule
from lightning_iet.modules.pipelines import synthetic_pipeline

SIZE, SCALE = 16, 2  # pixels; 8 rows of latents

PIPELINES = {
    "sd1": {"kind": "sd", "prediction_type": "epsilon"},
    "sd2": {"kind": "sd", "prediction_type": "v_prediction"},
    "sdxl": {"kind": "sdxl", "prediction_type": "epsilon"},
}


def save_pipelines(folder, names=tuple(PIPELINES)):
    """Write one pipeline of each kind, or of some; return their folders by name."""
    for name in names:
        synthetic_pipeline(**PIPELINES[name], image_size=SIZE, vae_scale=SCALE).save_pretrained(folder / name)
    return {name: folder / name for name in names}


class Captioned(Dataset):
    """Random images with captions; mirrored at random, or another one each time."""

    def __init__(self, num, flips=False, noise=False):
        self.images = torch.rand(num, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(num))
        self.flips, self.noise = flips, noise

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        if self.flips and torch.rand(()) < 0.5:
            image = image.flip(-1)
        if self.noise:
            image = torch.rand_like(image)
        return image, f"a picture of thing {index}", index


class CaptionedData(pl.LightningDataModule):
    """Eight images to train on, four to validate."""

    def __init__(self, num=8, batch_size=2, **kwargs):
        super().__init__()
        self.num, self.batch_size, self.kwargs = num, batch_size, kwargs

    def setup(self, stage):
        self.train_set, self.control_set = Captioned(self.num, **self.kwargs), Captioned(4)
        self.reference_set = Captioned(6)

    def train_dataloader(self):
        return DataLoader(self.train_set, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.control_set, self.batch_size)


def make_module(pretrained, seed=0, **kwargs):
    """A module that learns fast, with adapters (if any) from a seed."""
    settings = {"ema_decay": 0.5, "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TextToImageModule(pretrained, **settings | kwargs)
