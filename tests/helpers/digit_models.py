"""Small diffusion models of digits, as fresh and as overfitted as tests need them."""

import lightning
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from sklearn.datasets import load_digits

from lightning_iet import DiffusionModule
from lightning_iet.functional.seeding import derive_seed
from tests.helpers.models import tiny_unet


def digit_pixels(start, stop):
    """Digits in an order of chance, uint8, shape ``(N, 1, 8, 8)``."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[start:stop]
    return torch.from_numpy(load_digits().images)[order, None].div(16).mul(255).round().to(torch.uint8)


def fresh_model(seed=0, *, unet=None, num_classes=None, **scheduler):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {"num_train_timesteps": 100, "beta_end": 0.2} | scheduler
        return DiffusionModule(
            tiny_unet(**({"block_out_channels": (32,)} | (unet or {}))),
            scheduler=DDPMScheduler(**settings),
            ema_decay=0.5,
            num_classes=num_classes,
        )


def save_checkpoint(model, path):
    """As Lightning writes it."""
    checkpoint = {"state_dict": model.state_dict(), "pytorch-lightning_version": lightning.__version__}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)


def save_pipeline(model, folder, kind=DDPMPipeline):
    """As diffusers writes it; nothing of it may speak."""
    kind(unet=model.unet, scheduler=model.scheduler).save_pretrained(folder)


def overfitted_model(pixels, *, steps=180):
    """A model that has seen the same few images over and over; only its averaged weights have."""
    model, images = fresh_model(), pixels.float() / 255
    optimizer = torch.optim.Adam(model.unet.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        timesteps = torch.randint(50, (len(images),), generator=generator)
        loss = model.losses(images, timesteps, torch.randn(images.shape, generator=generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.ema.module.load_state_dict(model.unet.state_dict())
    model.unet.load_state_dict(fresh_model().unet.state_dict())
    return model


def drawn(pipeline, numbers, *, seed=0, steps=3):
    generators = [torch.Generator().manual_seed(derive_seed(seed, number)) for number in numbers]
    images = pipeline(batch_size=len(numbers), generator=generators, num_inference_steps=steps, output_type="np").images
    return torch.tensor(images).permute(0, 3, 1, 2)
