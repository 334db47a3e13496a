"""A trained denoiser as a pipeline of diffusers."""

import copy

import torch
from diffusers import DDPMPipeline, SchedulerMixin
from torch import nn

from lightning_iet.modules.pretrained import DENOISERS

__all__ = ["make_pipeline"]


def make_pipeline(denoiser: nn.Module, scheduler: SchedulerMixin) -> DDPMPipeline:
    """Put copies of a denoiser and its scheduler into a ``DDPMPipeline``.

    Args:
        denoiser: A U-Net or transformer of diffusers.
        scheduler: A sampler of diffusers.

    Returns:
        The pipeline, on the CPU, in evaluation mode, without a progress bar.

    Raises:
        TypeError: If the denoiser is another one.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> make_pipeline(nn.Identity(), DDPMScheduler())
        Traceback (most recent call last):
        ...
        TypeError: Argument `unet` expected a UNet2DModel or DiTTransformer2DModel of diffusers to make a pipeline of,
        but got Identity. ...
    """
    if type(denoiser).__name__ not in DENOISERS or not hasattr(denoiser, "save_pretrained"):
        raise TypeError(
            f"Argument `unet` expected a {' or '.join(DENOISERS)} of diffusers to make a pipeline of, "
            f"but got {type(denoiser).__name__}. Keep its checkpoint instead."
        )
    own = copy.deepcopy(denoiser).cpu().float().eval().requires_grad_(False)
    # Files of weights hold them row by row, whatever order training had them in (`channels_last`).
    own = own.to(memory_format=torch.contiguous_format)
    pipeline = DDPMPipeline(unet=own, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
