"""Training the projects, with AGC and without."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_iet.callbacks.anti_gradient_control.callback import AntiGradientControl
from tests.helpers.models import quiet_trainer
from tests.helpers.projects.common import NUM_TIMESTEPS, THRESHOLD


def batches(num_samples=156):
    """Twenty batches of eight (or others), the last one smaller."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_samples, 2, 4, 4, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(images, torch.randint(10, (num_samples,), generator=generator)), batch_size=8)


def fit(tmp_path, project, *callbacks, num_samples=156, **kwargs):
    torch.manual_seed(1)
    trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), **({"max_epochs": 1} | kwargs))
    trainer.fit(project, batches(num_samples))
    return trainer


def make(style, threshold=THRESHOLD):
    agc = AntiGradientControl(threshold, **({"num_timesteps": NUM_TIMESTEPS} | getattr(style, "AGC", {})))
    agc.load_shard_state(agc.shard_state() | {"bank": agc.bank.double()})
    return agc
