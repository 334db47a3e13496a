"""Images as an autoencoder of Stable Diffusion's class sees them."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from lightning_iet.modules.latent_diffusion.cache import EncodingCache

__all__ = ["Cacheable", "Cached", "LatentEncoder"]


class Cacheable(NamedTuple):
    """Images, ``(B, 3, H, W)``, that are to be kept under these keys once they are encoded."""

    images: Tensor
    keys: list[str]


class Cached(NamedTuple):
    """What the encoder has made of images before: mean and logarithm of the variance, ``(B, 2c, h, w)``."""

    moments: Tensor


class LatentEncoder(nn.Module):
    """The autoencoder of a pipeline, frozen; always in the precision of its weights, for float16 would overflow.

    Args:
        vae: Of diffusers, an ``AutoencoderKL``.
        cache: Where encodings are kept: ``"memory"``, a folder, or ``"none"``. Mean and variance are kept, not a draw:
            latents stay as random as they are without a cache. *(our choice)*

    Example:
        >>> from lightning_iet.modules.latent_diffusion.synthetic import synthetic_pipeline
        >>> encoder = LatentEncoder(synthetic_pipeline().vae)
        >>> latents = encoder(torch.rand(2, 3, 32, 32))
        >>> latents.shape, encoder.decode(latents).shape
        (torch.Size([2, 4, 4, 4]), torch.Size([2, 3, 32, 32]))
    """

    def __init__(self, vae: Any, *, cache: str | Path = "none") -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        self.cache = None if cache == "none" else EncodingCache(cache, self)
        self._samples: set[int] = set()
        self.eval()

    @property
    def scale(self) -> int:
        """Pixels for each row of latents."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def train(self, mode: bool = True) -> "LatentEncoder":
        """What is frozen stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor | Cached | Cacheable, *, at_mean: bool = False) -> Tensor:
        """Encode images in [0, 1].

        Args:
            images: Shape ``(B, 3, H, W)``, or what :meth:`look_up` has made of them.
            at_mean: Whether to take the most probable latents instead of drawing them.

        Returns:
            Latents, shape ``(B, c, H / scale, W / scale)``, of about unit variance.

        Raises:
            ValueError: If the size of the images is no multiple of the scale.
        """
        moments = images.moments if isinstance(images, Cached) else self._moments(images)
        distribution = DiagonalGaussianDistribution(moments)
        latents = distribution.mode() if at_mean else distribution.sample()
        return latents * self.vae.config.scaling_factor

    def look_up(self, images: Tensor, index: Tensor | None = None) -> Cached | Cacheable | Tensor:
        """Exchange images on the CPU for what is kept of them, or have them kept when they are encoded.

        Here, before a batch goes to the device: no step waits for the device, and images that are known stay at home.

        Args:
            images: Shape ``(B, 3, H, W)``.
            index: Which samples of the training set they are, shape ``(B,)``.

        Raises:
            ValueError: If more is kept than each sample's image and mirror image: it is of no use, and grows for ever.
        """
        if self.cache is None:
            return images
        if index is not None:
            self._samples.update(index.tolist())
            if self.cache.num_written > 2 * len(self._samples):
                raise ValueError(
                    "Argument `cache_latents` expected images that are always the same, or mirrored, but got "
                    f"{self.cache.num_written} different ones of {len(self._samples)} samples. Switch off other random "
                    "changes of images, or the cache with cache_latents=none."
                )
        keys = self.cache.keys(images)
        found = self.cache.get(keys)
        return Cacheable(images, keys) if found is None else Cached(found[0])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents into images in [0, 1]."""
        with torch.autocast(latents.device.type, enabled=False):
            images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return (images / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def _moments(self, images: Tensor | Cacheable) -> Tensor:
        pixels = images.images if isinstance(images, Cacheable) else images
        if pixels.shape[2] % self.scale or pixels.shape[3] % self.scale:
            raise ValueError(
                f"Argument `images` expected height and width in multiples of {self.scale}, the pixels for each row of "
                f"the autoencoder's latents, but got {pixels.shape[2]} × {pixels.shape[3]}. Resize the data."
            )
        with torch.autocast(pixels.device.type, enabled=False):
            distribution = self.vae.encode(pixels.to(self.vae.dtype) * 2 - 1).latent_dist
        # In this order whatever the autoencoder's: noise "like" latents is drawn in the order in which they lie.
        moments: Tensor = distribution.parameters.contiguous()
        if isinstance(images, Cacheable) and self.cache is not None:
            self.cache.put(images.keys, [moments])
        return moments
