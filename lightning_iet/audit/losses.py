"""The generator's loss on real images, at the same timesteps and with the same noise for every set."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_iet.audit.cache import BlockCache, in_blocks
from lightning_iet.audit.reading import ImageSet
from lightning_iet.evaluation.membership import choose_images, losses_at, spread_timesteps
from lightning_iet.utilities.fingerprints import digest

if TYPE_CHECKING:  # which imports diffusers
    from lightning_iet.audit.generator import Generator


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


def measure_losses(
    generator: "Generator",
    images: ImageSet,
    probing: Probing,
    *,
    cache: BlockCache,
    argument: str,
    labels: Tensor | None = None,
) -> Tensor:
    """Measure the loss of images at several timesteps.

    Args:
        generator: the model.
        images: real images, of the model's size and channels.
        probing: which of them, and where.
        cache: where finished blocks go.
        argument: what the images are, for the bar.
        labels: class of each image, shape ``(N,)``, for a model that cannot do without; ``None`` = none are given.

    Returns:
        Shape ``(n, J)``, float32, on every process.
    """
    places = choose_images(len(images), probing.images, seed=probing.seed)
    steps = spread_timesteps(probing.timesteps, generator.module.num_timesteps)
    settings = (generator.sha256, images.sha256, images.pixels.shape, probing.seed, steps.tolist())
    of_labels = () if labels is None else (labels.tolist(),)
    blocks = in_blocks(
        f"Losses of {argument} images",
        [digest("losses", *settings, *of_labels, part.tolist()) for part in places.split(probing.batch_size)],
        lambda place, progress: {
            "losses": losses_at(
                generator.module,
                images.pixels[places[place]],
                places[place],
                steps,
                seed=probing.seed,
                use_ema=generator.use_ema,
                condition=None if labels is None else labels[places[place]],
                progress=progress,
            )
        },
        cache=cache,
        total=len(places),
        block=probing.batch_size,
    )
    return torch.cat([block["losses"] for block in blocks])
