"""The generator's loss on real images, at the same timesteps and with the same noise for every set."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_iet.audit.cache import BlockCache, Progress, digest, in_blocks
from lightning_iet.audit.generator import Generator
from lightning_iet.audit.reading import ImageSet
from lightning_iet.functional.checks import unit_interval
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.devices import full_precision


@dataclass(frozen=True, kw_only=True)
class Probing:
    """Which losses are measured.

    Attributes:
        images: at most so many images of each set, chosen at random; ``None`` = all.
        timesteps: draws of noise for each image, each at a timestep of its own.
        seed: seed of the noise, and of the choice.
        batch_size: images at once.
    """

    images: int | None = None
    timesteps: int = 20
    seed: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if self.images is not None and self.images < 2:
            raise ValueError(f"Argument `loss_images` expected an integer ≥ 2, but got {self.images}.")
        if self.timesteps < 1:
            raise ValueError(f"Argument `loss_timesteps` expected an integer ≥ 1, but got {self.timesteps}.")

    def choose(self, total: int) -> Tensor:
        """Return the positions of the images, ascending, shape ``(n,)``.

        Example:
            >>> Probing(images=3).choose(3), len(Probing(images=3).choose(100))
            (tensor([0, 1, 2]), 3)
        """
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))
        return order[: self.images].sort().values


def spread_timesteps(count: int, total: int) -> Tensor:
    """Return the middles of equal parts of 0 … T - 1: every part of the schedule has the same weight.

    Args:
        count: number of timesteps; no more than there are.
        total: T.

    Returns:
        Ascending, int64, shape ``(count,)``.

    Example:
        >>> spread_timesteps(4, 1000)
        tensor([125, 375, 625, 875])
    """
    count = min(count, total)
    return torch.tensor([(2 * part + 1) * total // (2 * count) for part in range(count)])


def noise_of(index: int, draw: int, shape: torch.Size, *, seed: int) -> Tensor:
    """Return the noise of one draw: it depends on the image's position in its set, whichever set that is.

    Args:
        index: position of the image.
        draw: number of the draw.
        shape: ``(C, H, W)``.
        seed: seed of the audit.

    Returns:
        Standard normal, shape ``(C, H, W)``, on the CPU.
    """
    # 1 + draw, for zeros at the end do not count: (seed, index, 0) is the seed of the image that is drawn as `index`.
    return torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed(seed, index, 1 + draw)))


def measure_losses(
    generator: Generator, images: ImageSet, probing: Probing, *, cache: BlockCache, argument: str
) -> Tensor:
    """Measure the loss of images at several timesteps.

    Args:
        generator: the model.
        images: real images, of the model's size and channels.
        probing: which of them, and where.
        cache: where finished blocks go.
        argument: what the images are, for the bar.

    Returns:
        Shape ``(n, J)``, float32, on every process.
    """
    places = probing.choose(len(images))
    steps = spread_timesteps(probing.timesteps, generator.module.num_timesteps)
    settings = (generator.sha256, images.sha256, images.pixels.shape, probing.seed, steps.tolist())
    blocks = in_blocks(
        f"Losses of {argument} images",
        [digest("losses", *settings, part.tolist()) for part in places.split(probing.batch_size)],
        lambda place, progress: {
            "losses": probe_losses(
                generator.module,
                images.pixels[places[place]],
                places[place],
                steps,
                seed=probing.seed,
                use_ema=generator.use_ema,
                progress=progress,
            )
        },
        cache=cache,
        total=len(places),
        block=probing.batch_size,
    )
    return torch.cat([block["losses"] for block in blocks])


def probe_losses(
    module: Any,
    images: Tensor,
    places: Tensor,
    steps: Tensor,
    *,
    seed: int,
    use_ema: bool,
    condition: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Measure the loss of a batch of images at several timesteps, each with noise of its own.

    Args:
        module: the model, as :class:`~lightning_iet.DiffusionModule`; put into eval mode while it is asked.
        images: uint8, or floating point in [0, 1], shape ``(B, C, H, W)``.
        places: their positions in their set, shape ``(B,)``, which the noise depends on.
        steps: timesteps, shape ``(J,)``.
        seed: of the noise.
        use_ema: ask the averaged weights.
        condition: what the images show, for a module that takes conditions.
        progress: called with the number of images that are as good as done.

    Returns:
        Shape ``(B, J)``, on the CPU.
    """
    device = next(module.parameters()).device
    clean = unit_interval(images).to(device)
    options = {} if condition is None else {"condition": condition.to(device)}
    training, losses = module.training, []
    module.eval()
    try:
        with torch.no_grad(), full_precision(device.type):
            for draw, step in enumerate(steps.to(device)):
                noise = [noise_of(index, draw, clean.shape[1:], seed=seed) for index in places.tolist()]
                timesteps = step.expand(len(clean))
                found = module.losses(clean, timesteps, torch.stack(noise).to(clean), use_ema=use_ema, **options)
                losses.append(found.cpu())
                if progress is not None:
                    progress(len(places) * (draw + 1) // len(steps))
    finally:
        module.train(training)
    return torch.stack(losses, dim=1)
