"""The exponential moving average of a denoiser's weights."""

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["MovingAverage", "moving_average"]


def moving_average(unet: nn.Module, decay: float) -> AveragedModel:
    """A copy of a denoiser that is to follow it; it takes no gradients.

    Example:
        >>> moving_average(nn.Linear(1, 1), 0.9).module.weight.requires_grad
        False
    """
    ema = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return ema.requires_grad_(False)


class MovingAverage:
    """``ema <- d · ema + (1 - d) · unet``, from the first step on.

    ``AveragedModel.update_parameters`` asks a tensor on the device whether this is the first update: a wait for the
    device in every step. The arithmetic is the same; a first update that copies is not needed, for the average starts
    as a copy.

    Args:
        ema: Of :func:`moving_average`.
        unet: What it follows. Its tensors are listed once: walking through a model takes as long as averaging it.
    """

    def __init__(self, ema: AveragedModel, unet: nn.Module) -> None:
        self.count = ema.n_averaged
        self.average: Any = ema.multi_avg_fn
        self.parameters = list(ema.module.parameters()), list(unet.parameters())
        self.buffers = list(zip(ema.module.buffers(), unet.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one optimizer step; buffers are copied."""
        self.average(*self.parameters, self.count)
        for averaged, buffer in self.buffers:
            averaged.copy_(buffer)
        self.count += 1
