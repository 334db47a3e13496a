"""Sampling images from a denoiser, batch by batch, with classifier-free guidance."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_iet.functional.diffusion import guide
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.modules.noise_processes import Sampler, noise_process


def make_sampler(sampler: Sampler, trained: SchedulerMixin) -> SchedulerMixin:
    """Make the scheduler that samples, with the noise schedule of training.

    Args:
        sampler: ``"ddim"`` (deterministic given the first noise), ``"ddpm"`` (ancestral), or ``"own"``: the class of
            the scheduler of training, with its settings. For flow matching and EDM ``"ddim"`` is that class too.
        trained: The scheduler of training.

    Raises:
        ValueError: If the model cannot be sampled in that way.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> type(make_sampler("ddim", DDPMScheduler())).__name__
        'DDIMScheduler'
    """
    return noise_process(trained).sampler(sampler)


@torch.no_grad()
def sample_images(
    denoise: Callable[[Tensor, Tensor, Any], Tensor],
    scheduler: SchedulerMixin,
    shape: tuple[int, int, int],
    num: int,
    *,
    module: nn.Module,
    conditions: Callable[[range], Any] = lambda numbers: None,
    add_null: Callable[[Any], Any] | None = None,
    guidance_scale: float = 1.0,
    decode: Callable[[Tensor], Tensor] = lambda images: (images / 2 + 0.5).clamp(0, 1),
    seed: int = 0,
    start: int = 0,
    batch_size: int = 256,
    num_inference_steps: int = 50,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Sample images; each has a generator of its own, seeded from (seed, number of the image).

    Args:
        denoise: ``denoise(noisy (B, C, H, W), timesteps (B,), conditions of B samples) -> prediction``.
        scheduler: A sampler of diffusers, not yet told the number of steps.
        shape: ``(C, H, W)`` of what is denoised: of an image, or of its latents.
        num: Number of images.
        module: Put into evaluation mode meanwhile; its first parameter says the device and dtype.
        conditions: Returns the conditions of the images of these numbers, on the module's device.
        add_null: Returns B null conditions followed by the B given ones; for guidance.
        guidance_scale: See :func:`~lightning_iet.functional.diffusion.guide`; 1 = none, with one denoiser call a step.
        decode: Turns what is denoised into images in [0, 1].
        seed: Seed of the run of images.
        start: Number of the first image.
        batch_size: Images at once.
        num_inference_steps: Steps of the scheduler, at most those of training; one denoiser call each, except for
            schedulers of second order (Heun, KDPM2), which take two.
        progress: Called with the number of images of each finished batch.

    Returns:
        Images in [0, 1] on the CPU, shape ``(num, C, H, W)``.

    Raises:
        ValueError: For numbers out of range; for images that are not finite.
    """
    most = scheduler.config.num_train_timesteps
    for name, value in (("num", num), ("batch_size", batch_size), ("num_inference_steps", num_inference_steps)):
        if value < 1:
            raise ValueError(f"Argument `{name}` expected an integer ≥ 1, but got {value}.")
    if num_inference_steps > most:
        raise ValueError(f"Argument `num_inference_steps` expected at most {most}, but got {num_inference_steps}.")
    scale = getattr(scheduler, "scale_model_input", None)
    is_random = "generator" in signature(scheduler.step).parameters
    weight = next(module.parameters())
    was_training = module.training
    module.eval()
    try:
        batches = []
        for first in range(start, start + num, batch_size):
            numbers = range(first, min(first + batch_size, start + num))
            generators = [torch.Generator().manual_seed(derive_seed(seed, number)) for number in numbers]
            # Noise comes from the CPU, so that a seed means the same images on every device.
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
            scheduler.set_timesteps(num_inference_steps)  # anew: many count their steps, or remember earlier ones
            images = noise.to(weight) * getattr(scheduler, "init_noise_sigma", 1.0)
            told = conditions(numbers)
            with parametrize.cached():  # SV-DIFF forms its weights once, not in each step
                for timestep in scheduler.timesteps:
                    timesteps = timestep.to(images.device).expand(len(images))
                    seen = images if scale is None else scale(images, timestep)
                    prediction = guided(denoise, seen, timesteps, told, add_null=add_null, scale=guidance_scale)
                    random = {"generator": generators} if is_random else {}
                    images = scheduler.step(prediction, timestep, images, **random).prev_sample
            batches.append(_finite(decode(images).float().cpu()))
            if progress is not None:
                progress(len(numbers))
        return torch.cat(batches)
    finally:
        module.train(was_training)


def _finite(images: Tensor) -> Tensor:
    """Return images, or refuse what is none: NaN would become black in a file, and pass for an image."""
    broken = int((~images.isfinite().flatten(1).all(dim=1)).sum())
    if broken:
        raise ValueError(
            f"Sampling expected finite images, but got NaN or infinity in {broken} of {len(images)}. The model has "
            "diverged, or its scheduler does not fit it (zero terminal SNR needs prediction_type: v_prediction): use "
            "an earlier checkpoint, or another scheduler."
        )
    return images


def guided(
    denoise: Callable[[Tensor, Tensor, Any], Tensor],
    noisy: Tensor,
    timesteps: Tensor,
    conditions: Any,
    *,
    add_null: Callable[[Any], Any] | None,
    scale: float,
) -> Tensor:
    """Predict with classifier-free guidance, by one denoiser call of twice as many samples.

    Args:
        denoise: See :func:`sample_images`.
        noisy: Noisy images, shape ``(B, C, H, W)``.
        timesteps: Shape ``(B,)``.
        conditions: Of the B images.
        add_null: See :func:`sample_images`; ``None`` = no guidance.
        scale: See :func:`~lightning_iet.functional.diffusion.guide`; 1 = none.

    Returns:
        The prediction, shape ``(B, C, H, W)``.

    Example:
        >>> x, t, c = torch.ones(1), torch.zeros(1), torch.tensor([2.0])
        >>> guided(lambda x, t, c: x + c, x, t, c, add_null=lambda c: torch.cat([0 * c, c]), scale=3.0)
        tensor([7.])
    """
    if scale == 1 or add_null is None:
        return denoise(noisy, timesteps, conditions)
    both = denoise(torch.cat([noisy, noisy]), timesteps.repeat(2), add_null(conditions))
    unconditional, conditional = both.chunk(2)
    return guide(conditional, unconditional, scale=scale)
