"""Images that a generator draws to be audited: block by block, kept on disk, in turns with the other processes."""

from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor

from lightning_iet.audit.cache import BlockCache, digest
from lightning_iet.audit.generator import Generator
from lightning_iet.audit.images import ImageSet, image_set
from lightning_iet.audit.progress import Progress
from lightning_iet.audit.work import in_blocks
from lightning_iet.modules.sampling import Sampler

__all__ = ["Drawing", "draw"]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Which images are drawn, and how.

    Attributes:
        num_samples: number of images.
        seed: seed of the run of images; image i depends on it and on i alone.
        sampler: ``"ddim"`` or ``"ddpm"``.
        num_inference_steps: denoiser calls for each image.
        batch_size: images at once; what is drawn is kept after each of these.
    """

    num_samples: int
    seed: int = 0
    sampler: Sampler = "ddim"
    num_inference_steps: int = 50
    batch_size: int = 256

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name, least in (("num_samples", 1), ("seed", 0), ("num_inference_steps", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"Argument `{name}` expected an integer ≥ {least}, but got {value}.")


def draw(generator: Generator, drawing: Drawing, *, cache: BlockCache) -> ImageSet:
    """Draw images, or take from the cache what was drawn before by the same weights with the same settings.

    Args:
        generator: the model; its images are rounded to 8 bits.
        drawing: which images.
        cache: where finished blocks go.

    Returns:
        The images on every process, named by their number.
    """

    def sample(place: slice, progress: Progress) -> dict[str, Tensor]:
        images = generator.module.sample(
            place.stop - place.start,
            seed=drawing.seed,
            start=place.start,
            batch_size=drawing.batch_size,
            sampler=drawing.sampler,
            num_inference_steps=drawing.num_inference_steps,
            use_ema=generator.use_ema,
        )
        return {"pixels": images.mul(255).round().to(torch.uint8)}

    settings = (generator.sha256, diffusers.__version__, drawing.seed, drawing.sampler, drawing.num_inference_steps)
    step, num = drawing.batch_size, drawing.num_samples
    blocks = in_blocks(
        "Drawing images",
        [digest("drawn", *settings, start, min(start + step, num)) for start in range(0, num, step)],
        sample,
        cache=cache,
        total=num,
        block=step,
    )
    return image_set(torch.cat([block["pixels"] for block in blocks]), location=f"drawn by {generator.location}")
