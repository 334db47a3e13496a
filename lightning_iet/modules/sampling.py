"""Drawing images from a denoiser with diffusers' schedulers."""

from collections.abc import Callable
from typing import Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
from torch import Tensor, nn

from lightning_iet.functional.seeding import derive_seed

__all__ = ["Sampler", "check_sampling", "in_batches", "make_sampler", "sample_images"]

Sampler = Literal["ddim", "ddpm"]


@torch.no_grad()
def sample_images(
    denoise: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    scheduler: SchedulerMixin,
    image_shape: tuple[int, int, int],
    num: int,
    *,
    module: nn.Module,
    labels: Tensor | None = None,
    seed: int = 0,
    start: int = 0,
    batch_size: int = 256,
    num_inference_steps: int = 50,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Draw images; each has a generator of its own, seeded from (seed, number of the image).

    Args:
        denoise: ``denoise(noisy (B, C, H, W), timesteps (B,), labels (B,) or None) -> prediction``.
        scheduler: A sampler of diffusers, not yet told the number of steps.
        image_shape: ``(C, H, W)``.
        num: Number of images.
        module: Put into eval mode while drawing; says the device and dtype.
        labels: What each image shows, shape ``(num, ...)``; ``None`` = no conditions.
        seed: Seed of the run of images.
        start: Number of the first image.
        batch_size: Images at once.
        num_inference_steps: Denoiser calls per image.
        progress: Called with the number of images of each finished batch.

    Returns:
        Images in [0, 1] on the CPU, shape ``(num, C, H, W)``.

    Raises:
        ValueError: For numbers out of range.
    """
    check_sampling(num, batch_size, num_inference_steps, most=scheduler.config.num_train_timesteps)
    scheduler.set_timesteps(num_inference_steps)
    weight = next(module.parameters())

    def draw(numbers: range) -> Tensor:
        generators = [torch.Generator().manual_seed(derive_seed(seed, number)) for number in numbers]
        told = None if labels is None else labels[numbers.start - start : numbers.stop - start].to(weight.device)
        return _sample_batch(denoise, scheduler, image_shape, generators, weight, labels=told)

    return in_batches(draw, num, module=module, start=start, batch_size=batch_size, progress=progress)


def make_sampler(sampler: Sampler, trained: SchedulerMixin) -> SchedulerMixin:
    """The scheduler that draws, with the noise schedule of training.

    Args:
        sampler: ``"ddim"`` (deterministic given the first noise) or ``"ddpm"`` (ancestral).
        trained: The scheduler of training.

    Example:
        >>> type(make_sampler("ddim", DDPMScheduler())).__name__
        'DDIMScheduler'
    """
    kind = DDIMScheduler if sampler == "ddim" else DDPMScheduler
    return kind.from_config(trained.config)


def check_sampling(num: int, batch_size: int, num_inference_steps: int, *, most: int) -> None:
    """Refuse numbers out of range.

    Args:
        num: Number of images.
        batch_size: Images at once.
        num_inference_steps: Denoiser calls per image.
        most: Timesteps of training.

    Raises:
        ValueError: Naming the argument.
    """
    for name, value in (("num", num), ("batch_size", batch_size), ("num_inference_steps", num_inference_steps)):
        if value < 1:
            raise ValueError(f"Argument `{name}` expected an integer ≥ 1, but got {value}.")
    if num_inference_steps > most:
        raise ValueError(f"Argument `num_inference_steps` expected at most {most}, but got {num_inference_steps}.")


def in_batches(
    draw: Callable[[range], Tensor],
    num: int,
    *,
    module: nn.Module,
    start: int = 0,
    batch_size: int,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Draw images batch by batch.

    Args:
        draw: Draws the images of these numbers, shape ``(len(numbers), C, H, W)``.
        num: Number of images.
        module: Put into eval mode while drawing.
        start: Number of the first image.
        batch_size: Images at once.
        progress: Called with the number of images of each finished batch.

    Returns:
        Shape ``(num, C, H, W)``.

    Example:
        >>> in_batches(lambda numbers: torch.tensor(numbers), 5, module=nn.Identity(), start=2, batch_size=2)
        tensor([2, 3, 4, 5, 6])
    """
    was_training = module.training
    module.eval()
    try:
        batches = []
        for first in range(start, start + num, batch_size):
            numbers = range(first, min(first + batch_size, start + num))
            batches.append(draw(numbers))
            if progress is not None:
                progress(len(numbers))
        return torch.cat(batches)
    finally:
        module.train(was_training)


def _sample_batch(
    denoise: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    scheduler: SchedulerMixin,
    image_shape: tuple[int, int, int],
    generators: list[torch.Generator],
    like: Tensor,
    *,
    labels: Tensor | None,
) -> Tensor:
    # Noise is drawn on the CPU, so that a seed means the same images on every device.
    images = torch.stack([torch.randn(image_shape, generator=generator) for generator in generators]).to(like)
    for timestep in scheduler.timesteps:
        prediction = denoise(images, timestep.to(images.device).expand(len(images)), labels)
        images = scheduler.step(prediction, timestep, images, generator=generators).prev_sample
    return (images / 2 + 0.5).clamp(0, 1).float().cpu()
