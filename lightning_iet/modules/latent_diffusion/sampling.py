"""Drawing latents with classifier-free guidance, as the pipelines of diffusers do."""

from collections.abc import Callable, Sequence

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from lightning_iet.functional.diffusion import guide
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.modules.latent_diffusion.captions import Conditions

__all__ = ["draw_latents"]


def draw_latents(
    denoise: Callable[[Tensor, Tensor, Conditions], Tensor],
    scheduler: SchedulerMixin,
    shape: tuple[int, int, int],
    numbers: Sequence[int],
    *,
    conditions: Conditions,
    null: Conditions,
    guidance_scale: float,
    seed: int,
) -> Tensor:
    r"""Draw the latents of some images; each has a generator of its own, seeded from (seed, number of the image).

    With a guidance scale :math:`s > 1` the denoiser predicts twice, with the captions and without; see
    :func:`~lightning_iet.functional.diffusion.guide`.

    Args:
        denoise: ``denoise(latents (B, c, h, w), timestep (), conditions) -> prediction``.
        scheduler: A sampler of diffusers that has been told the number of steps.
        shape: ``(c, h, w)`` of one image's latents.
        numbers: Numbers of the images.
        conditions: Of each of them.
        null: What stands for no caption, one row.
        guidance_scale: :math:`s`; 1 = no guidance.
        seed: Seed of the run of images.

    Returns:
        Latents, shape ``(len(numbers), c, h, w)``.
    """
    generators = [torch.Generator().manual_seed(derive_seed(seed, number)) for number in numbers]
    # Noise is drawn on the CPU, so that a seed means the same images on every device.
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    latents = noise.to(conditions.hidden) * scheduler.init_noise_sigma
    is_guided = guidance_scale > 1
    if is_guided:
        conditions = conditions.behind(null)
    for timestep in scheduler.timesteps:
        noisy = torch.cat([latents] * 2) if is_guided else latents
        prediction = denoise(noisy, timestep.to(latents.device), conditions)
        if is_guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = guide(conditional, unconditional, scale=guidance_scale)
        latents = scheduler.step(prediction, timestep, latents, generator=generators).prev_sample
    return latents
