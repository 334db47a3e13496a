"""DP-SGD with Opacus: the end of the scale that comes with a proof."""

import time
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from benchmarks.mitigation.data import Sets
from benchmarks.mitigation.rows import Row
from benchmarks.mitigation.settings import Setting
from benchmarks.mitigation.training import make_module
from lightning_iet import DiffusionModule

CLIP = 1.0  # norm of an image's gradient
DELTA = 1e-3  # less than one over the number of images, of which there are few
LEARNING_RATE = 1e-3  # noise on every gradient asks for a smaller one


def train_privately(setting: Setting, row: Row, seed: int, folder: Path) -> dict[int, dict[str, float]]:
    """Train on clipped and noised gradients of single images, as long as plain training is best trained.

    Abadi et al., *Deep Learning with Differential Privacy*, CCS 2016, arXiv:1607.00133. The noise is what the row's
    epsilon allows for that many steps; batches are drawn by Poisson sampling, as the accountant assumes.

    Returns:
        For its one mark: steps, seconds of the processor, and the epsilon that was spent, at delta = 0.001.

    Raises:
        ModuleNotFoundError: without Opacus, naming how to install it.
    """
    check_opacus()
    from opacus import PrivacyEngine  # an extra

    engine = PrivacyEngine()
    folder.mkdir(parents=True, exist_ok=True)
    module = make_module(setting, row, seed=seed)
    loader = DataLoader(Sets(setting, row, seed=seed).train_set, batch_size=setting.batch_size, shuffle=True)
    epochs = -(-setting.stop // len(loader))
    _, optimizer, loader = engine.make_private_with_epsilon(
        module=module.unet.train(),
        optimizer=torch.optim.Adam(module.unet.parameters(), lr=LEARNING_RATE),
        data_loader=loader,
        target_epsilon=row.epsilon,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=CLIP,
    )
    start = time.process_time()
    for _ in range(epochs):
        for images, *_ in loader:
            if len(images):  # a Poisson sample is empty with a chance below 1e-6
                _step(module, optimizer, images)
    torch.save({"state_dict": module.state_dict()}, folder / f"{setting.stop:05d}.ckpt")
    spent = {"seconds": time.process_time() - start, "skip_rate": 0.0, "epsilon": engine.get_epsilon(DELTA)}
    return {setting.stop: {"steps": epochs * len(loader), **spent}}


def _step(module: DiffusionModule, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
    timesteps = torch.randint(module.num_timesteps, (len(images),))
    loss = module.losses(images, timesteps, torch.randn_like(images)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    module.ema.update_parameters(module.unet)


def check_opacus() -> None:
    """Refuse to start without Opacus.

    Raises:
        ModuleNotFoundError: naming how to install it.
    """
    if find_spec("opacus") is None:
        raise ModuleNotFoundError(
            "The row 'dp_sgd' needs Opacus: pip install 'lightning-iet[benchmarks]', or leave it out: --without dp_sgd."
        )
