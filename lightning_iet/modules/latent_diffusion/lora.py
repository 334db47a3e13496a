"""Low-rank adapters (LoRA), by peft."""

from collections.abc import Sequence
from typing import Any

from lightning_iet.utilities.errors import require


def add_lora(unet: Any, *, rank: int, alpha: float | None, targets: Sequence[str]) -> None:
    r"""Freeze a denoiser and put adapters into it: :math:`W x + (\alpha / r)\, B A x`, where B starts at zero.

    Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022,
    https://arxiv.org/abs/2106.09685.

    Args:
        unet: Of diffusers; its adapters are all that requires gradients afterwards.
        rank: :math:`r`, the rows of A.
        alpha: :math:`\alpha`; ``None`` = r, so that the adapters count in full.
        targets: Ends of names of layers.

    Raises:
        ValueError: If no layer has such a name.
    """
    peft = require("peft", "text-to-image")
    unet.requires_grad_(False)
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets), init_lora_weights="gaussian"
    )
    try:
        unet.add_adapter(config)
    except ValueError as error:
        raise ValueError(
            f"Argument `lora_targets` expected ends of names of layers of {type(unet).__name__}, such as to_q or "
            f"to_out.0, but got {list(targets)}: {str(error).splitlines()[0]}"
        ) from error


def fuse_lora(unet: Any) -> None:
    """Work adapters into the weights, in place: afterwards the denoiser is an ordinary one."""
    unet.fuse_lora()
    unet.unload_lora()
