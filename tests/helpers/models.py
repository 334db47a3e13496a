"""Small models and data for tests."""

import functools

import lightning.pytorch as pl
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from lightning.fabric.utilities import registry
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.utils.data import Dataset

from lightning_iet import DiffusionModule

# Lightning asks every installed distribution for callbacks whenever it makes a trainer; the rest is faster.
registry.entry_points = functools.cache(registry.entry_points)


def tiny_unet(**kwargs):
    """A U-Net of diffusers that takes milliseconds."""
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8,),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "add_attention": False,
    }
    return UNet2DModel(**(settings | kwargs))


def tiny_dit(**kwargs):
    settings = {"num_attention_heads": 1, "attention_head_dim": 8, "in_channels": 1, "num_layers": 1}
    return DiTTransformer2DModel(
        **settings | {"sample_size": 8, "norm_num_groups": 1, "num_embeds_ada_norm": 10} | kwargs
    )


def tiny_diffusion(seed=0, **kwargs):
    """A DiffusionModule around :func:`tiny_unet`, with weights from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiffusionModule(tiny_unet(**kwargs.pop("unet", {})), ema_decay=0.9, **kwargs)


class DictModule(pl.LightningModule):
    """A stranger's module that returns losses per sample."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 3, dtype=dtype)
        self.num_timesteps = 10

    def training_step(self, batch, batch_idx):
        x = batch[0]
        timesteps = torch.randint(self.num_timesteps, (len(x),))
        losses = (self.net(x) - torch.randn_like(x)).square().mean(1)
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": timesteps}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Memory(Logger):
    """A logger that keeps what is logged, by epoch."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.epochs = []

    def log_metrics(self, metrics, step=None):
        while len(self.epochs) <= metrics["epoch"]:
            self.epochs.append({})
        self.epochs[int(metrics["epoch"])] |= metrics

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def quiet_trainer(tmp_path, **kwargs):
    """A trainer that writes and prints nothing unless asked to."""
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "max_epochs": 2,
    }
    return pl.Trainer(**(settings | kwargs))


class Pictures(Dataset):
    """Random images of 4 pixels with their index, in steps of 8 bits."""

    def __init__(self, num=24, scale=1.0):
        generator = torch.Generator().manual_seed(0)
        self.images = scale * (torch.rand(num, 1, 4, 4, generator=generator) * 255).round() / 255

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index
