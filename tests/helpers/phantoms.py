"""Images of low variety, as scanners make them: ellipses with a few discs in them, and a little noise."""

import math

import torch
import torch.nn.functional as F


def phantoms(count, *, seed=0, size=24, channels=1):
    """Float in [0, 1], shape ``(count, channels, size, size)``."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)

    axis = torch.arange(size) * (24 / size)
    y, x = axis[:, None], axis[None, :]
    inside = ((x - uniform(9, 15)) / uniform(5, 10)) ** 2 + ((y - uniform(9, 15)) / uniform(5, 10)) ** 2 < 1
    image = inside * uniform(0.3, 0.8)
    for _ in range(3):
        disc = (x - uniform(6, 18)) ** 2 + (y - uniform(6, 18)) ** 2 < uniform(1, 4) ** 2
        image = image + disc * uniform(-0.2, 0.2)
    tint = uniform(0.4, 1, channels) if channels > 1 else torch.ones(1, 1, 1, 1)
    noise = 0.02 * torch.randn(count, channels, size, size, generator=generator)
    return (image[:, None] * tint + noise).clamp(0, 1)


def eight_bits(images):
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def moved(images, *, angle=0.0, zoom=1.0, dx=0.0, dy=0.0):
    """Turn by degrees, zoom, and shift by shares of half the side."""
    cos, sin = math.cos(math.radians(angle)) / zoom, math.sin(math.radians(angle)) / zoom
    theta = torch.tensor([[[cos, -sin, dx], [sin, cos, dy]]]).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, "bicubic", "border", align_corners=False).clamp(0, 1)
