"""Images through a feature network, batch by batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_iet.functional.precision import full_precision

__all__ = ["embed_images"]


@torch.no_grad()
def embed_images(features: nn.Module, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Map images to feature vectors, in float32 whatever the precision around, and in memory for one batch.

    The network runs in evaluation mode, without dropout and without learning statistics; afterwards each of its modules
    is in the mode that it was in.

    Args:
        features: the network; its batches run where its parameters are.
        images: shape ``(N, C, H, W)``, uint8 or floating point in [0, 1].
        batch_size: images per batch.

    Returns:
        Shape ``(N, D)``, float32, where ``images`` are. ``(0, 0)`` for no images, whose width is unknown.

    Raises:
        ValueError: if a feature is NaN or infinite.

    Example:
        >>> embed_images(nn.Flatten(), torch.zeros(3, 1, 4, 4)).shape
        torch.Size([3, 16])
    """
    if len(images) == 0:
        return torch.zeros(0, 0, device=images.device)
    parameter = next(features.parameters(), images)
    with _evaluation_mode(features), full_precision(parameter.device.type):
        batches = (features(batch.to(parameter.device)) for batch in images.split(batch_size))
        rows = torch.cat([batch.flatten(1).to(images.device, torch.float32) for batch in batches])
    broken = ~rows.isfinite().all(dim=1)
    if broken.any():
        raise ValueError(
            f"Argument `features` expected a network with finite features, but got NaN or infinity for "
            f"{broken.sum()} of {len(images)} images, the first of index {broken.int().argmax()}. "
            "Look at that image, and at the weights."
        )
    return rows


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    training = [module for module in network.modules() if getattr(module, "training", False)]  # TorchScript may lack it
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
