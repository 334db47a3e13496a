"""Text and image encoders of latent diffusion, and a cache of their outputs."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_iet.utilities.files import write_atomically
from lightning_iet.utilities.fingerprints import checksums


class EncodingCache:
    """Encodings by the content that was encoded, in memory or on disk.

    A key is the SHA-256 of the content, its shape, and the weights that encode it: another image, size or encoder is
    another entry. No entry is ever stale, and several runs can share a folder.

    Args:
        place: ``"memory"``, or a folder, with one file for each entry, written atomically.
        encoder: The network that encodes; it must not be trained.

    Attributes:
        num_written: Entries that this object has made.

    Example:
        >>> cache = EncodingCache("memory", nn.Linear(2, 2))
        >>> keys = cache.keys(["a dog", "a cat"])
        >>> cache.put(keys, [torch.tensor([1.0, 2.0])])
        >>> cache.get(keys[1:])
        [tensor([2.])]
        >>> cache.get(cache.keys(["a cat", "a bird"])) is None
        True
    """

    def __init__(self, place: str | Path, encoder: nn.Module) -> None:
        self.num_written = 0
        self._folder = None if place == "memory" else Path(place)
        self._encoder = encoder
        self._entries: dict[str, tuple[Tensor, ...]] = {}

    @cached_property
    def _identity(self) -> bytes:
        # Only when it is needed: weights may be cast to another precision before training.
        return fingerprint(dict(self._encoder.named_parameters())).encode()

    def keys(self, contents: Sequence[str] | Tensor) -> list[str]:
        """Return the keys of captions, or of images ``(B, ...)`` on the CPU."""
        if isinstance(contents, Tensor):
            shape, rows = str(contents.shape[1:]).encode(), list(contents.contiguous().numpy())
        else:
            shape, rows = b"text", [caption.encode() for caption in contents]
        hashes = [hashlib.sha256(self._identity + shape) for _ in rows]
        for key, row in zip(hashes, rows, strict=True):
            key.update(row)
        return [key.hexdigest() for key in hashes]

    def get(self, keys: Sequence[str]) -> list[Tensor] | None:
        """Return the encodings of a batch, stacked, or None if one is missing."""
        rows = [row for row in map(self._read, keys) if row is not None]
        if len(rows) < len(keys):
            return None
        return [torch.stack(tensors) for tensors in zip(*rows, strict=True)]

    def put(self, keys: Sequence[str], encodings: Sequence[Tensor]) -> None:
        """Store the encodings of a batch, each of shape ``(B, ...)``."""
        on_host = [tensor.detach().cpu() for tensor in encodings]
        for number, key in enumerate(keys):
            self._write(key, tuple(tensor[number].clone(memory_format=torch.contiguous_format) for tensor in on_host))

    def _path(self, key: str) -> Path:
        assert self._folder is not None  # noqa: S101 (asked for on disk only)
        return self._folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> tuple[Tensor, ...] | None:
        if self._folder is None:
            return self._entries.get(key)
        path = self._path(key)
        if not path.is_file():
            return None
        return tuple(tensor for _, tensor in sorted(load_file(path).items()))

    def _has(self, key: str) -> bool:
        return key in self._entries if self._folder is None else self._path(key).is_file()

    def _write(self, key: str, tensors: tuple[Tensor, ...]) -> None:
        if self._has(key):  # a batch is encoded whole where one of its rows is missing
            return
        self.num_written += 1
        if self._folder is None:
            self._entries[key] = tensors
            return
        self._path(key).parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(self._path(key)) as unfinished:
            save_file({str(number): tensor for number, tensor in enumerate(tensors)}, unfinished)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of weights: of their names, shapes and values (the sum of each tensor's bits).

    Example:
        >>> fingerprint({"weight": torch.zeros(2)}) == fingerprint({"weight": torch.zeros(2) + 1e-30})
        False
    """
    sums = checksums(tensors.values()).tolist()
    found = [(name, tuple(tensor.shape), bits) for (name, tensor), bits in zip(tensors.items(), sums, strict=True)]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


class Conditions(NamedTuple):
    """The encoded captions of a batch, as a denoiser takes them."""

    hidden: Tensor
    """A state for each token, shape ``(B, L, D)``."""
    pooled: Tensor | None = None
    """One state for the whole caption, shape ``(B, P)``: SDXL only."""

    def replaced(self, where: Tensor, other: "Conditions") -> "Conditions":
        """Return these, with those of another in the rows where ``where``, shape ``(B,)``, is true.

        Example:
            >>> left, right = Conditions(torch.zeros(2, 1, 1)), Conditions(torch.ones(1, 1, 1))
            >>> left.replaced(torch.tensor([False, True]), right).hidden.flatten()
            tensor([0., 1.])
        """
        hidden = torch.where(where[:, None, None], other.hidden, self.hidden)
        if self.pooled is None or other.pooled is None:
            return Conditions(hidden)
        return Conditions(hidden, torch.where(where[:, None], other.pooled, self.pooled))

    def behind(self, first: "Conditions") -> "Conditions":
        """Return B times the one row of another, followed by these B rows."""
        hidden = torch.cat([first.hidden.expand_as(self.hidden), self.hidden])
        if self.pooled is None or first.pooled is None:
            return Conditions(hidden)
        return Conditions(hidden, torch.cat([first.pooled.expand_as(self.pooled), self.pooled]))

    def arguments(self, height: int, width: int) -> dict[str, Any]:
        """Return the keyword arguments of a U-Net of diffusers, beside latents and timesteps.

        SDXL takes the original size of an image, the position of its crop, and the target size, in pixels. Here images
        count as uncropped. *(our choice: data sets do not say)*
        """
        if self.pooled is None:
            return {"encoder_hidden_states": self.hidden}
        ids = self.pooled.new_tensor([height, width, 0, 0, height, width]).expand(len(self.pooled), 6)
        return {
            "encoder_hidden_states": self.hidden,
            "added_cond_kwargs": {"text_embeds": self.pooled, "time_ids": ids},
        }

    def to(self, device: torch.device) -> "Conditions":
        """Return these on a device."""
        pooled = None if self.pooled is None else self.pooled.to(device, non_blocking=True)
        return Conditions(self.hidden.to(device, non_blocking=True), pooled)


class CaptionEncoder(nn.Module):
    """The text encoders of a pipeline, frozen.

    As in the pipelines themselves: Stable Diffusion reads the last layer's states; SDXL the last but one of two
    encoders, side by side, and the second one's projected summary.

    Args:
        pipeline: A ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``.
        cache: Where encodings are kept: ``"memory"``, a folder, or ``"none"``.

    Example:
        >>> from lightning_iet.modules.pipelines import synthetic_pipeline
        >>> encoder = CaptionEncoder(synthetic_pipeline("sdxl"))
        >>> conditions = encoder(["a dog", "two cats"])
        >>> conditions.hidden.shape, conditions.pooled.shape
        (torch.Size([2, 77, 20]), torch.Size([2, 12]))
    """

    def __init__(self, pipeline: Any, *, cache: str | Path = "none") -> None:
        super().__init__()
        names = ("", "_2") if hasattr(pipeline, "text_encoder_2") else ("",)
        self.encoders = nn.ModuleList(getattr(pipeline, f"text_encoder{name}") for name in names)
        self.encoders.requires_grad_(False)
        self.tokenizers = [getattr(pipeline, f"tokenizer{name}") for name in names]
        self.null_is_zero = bool(getattr(pipeline.config, "force_zeros_for_empty_prompt", False))
        self.cache = None if cache == "none" else EncodingCache(cache, self)
        self._null: Conditions | None = None
        self.eval()

    def train(self, mode: bool = True) -> "CaptionEncoder":
        """Stay in evaluation mode: the encoders are frozen."""
        return super().train(False)

    def forward(self, captions: Sequence[str], *, keep: bool = False) -> Conditions:
        """Encode captions, on the device of the encoders; tokens beyond the encoders' length are cut off.

        With ``keep``, new encodings go into the cache.
        """
        if self.cache is None:
            return self._encode(captions)
        keys = self.cache.keys(captions)
        found = self.cache.get(keys)
        if found is not None:
            return Conditions(*found).to(self.device)
        encoded = self._encode(captions)
        if keep:
            self.cache.put(keys, [tensor for tensor in encoded if tensor is not None])
        return encoded

    def null(self) -> Conditions:
        """Return the condition of no caption, one row: the empty caption's, or zeros where the pipeline does so."""
        if self._null is None:
            null = self._encode([""])
            if self.null_is_zero and null.pooled is not None:
                null = Conditions(torch.zeros_like(null.hidden), torch.zeros_like(null.pooled))
            self._null = null
        return self._null.to(self.device)

    @property
    def device(self) -> torch.device:
        """The device of the encoders."""
        return next(self.parameters()).device

    @torch.no_grad()
    def _encode(self, captions: Sequence[str]) -> Conditions:
        tokens = [
            tokenizer(
                list(captions),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(self.device)
            for tokenizer in self.tokenizers
        ]
        with torch.autocast(self.device.type, enabled=False):
            outputs = [
                encoder(ids, output_hidden_states=True) for encoder, ids in zip(self.encoders, tokens, strict=True)
            ]
        if len(outputs) == 1:
            return Conditions(outputs[0][0])
        return Conditions(torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1][0])


def check_captioned(batch: Any) -> None:
    """Refuse a batch that is not ``(images, captions, …)``.

    Raises:
        ValueError: If captions are missing, or are something else, or images have other than three channels.

    Example:
        >>> check_captioned([torch.zeros(1, 3, 8, 8), torch.tensor([4])])
        Traceback (most recent call last):
        ...
        ValueError: Argument `batch` expected a list of captions as its second entry, but got a Tensor. Use ...
    """
    entries = list(batch) if isinstance(batch, tuple | list) else [batch]
    captions = entries[1] if len(entries) > 1 else None
    if not isinstance(captions, tuple | list) or not all(isinstance(caption, str) for caption in captions):
        got = "nothing" if captions is None else f"a {type(captions).__name__}"
        raise ValueError(
            f"Argument `batch` expected a list of captions as its second entry, but got {got}. Use a data set of "
            "(image, caption, index), such as CaptionFolderDataModule has."
        )
    if isinstance(entries[0], Tensor) and (entries[0].ndim != 4 or entries[0].shape[1] != 3):
        raise ValueError(
            f"Argument `batch` expected images of shape (B, 3, H, W), but got {tuple(entries[0].shape)}. Read them in "
            "color."
        )


class Cacheable(NamedTuple):
    """Images, ``(B, 3, H, W)``, whose encodings go into the cache under these keys."""

    images: Tensor
    keys: list[str]


class Cached(NamedTuple):
    """Encodings from the cache: mean and logarithm of the variance, ``(B, 2c, h, w)``."""

    moments: Tensor


class LatentEncoder(nn.Module):
    """The autoencoder of a pipeline, frozen; always in the precision of its weights, for float16 would overflow.

    Args:
        vae: Of diffusers, an ``AutoencoderKL``.
        cache: Where encodings are kept: ``"memory"``, a folder, or ``"none"``. Mean and variance are kept, so that
            latents are as random as without a cache. *(our choice)*

    Example:
        >>> from lightning_iet.modules.pipelines import synthetic_pipeline
        >>> encoder = LatentEncoder(synthetic_pipeline().vae)
        >>> latents = encoder(torch.rand(2, 3, 32, 32))
        >>> latents.shape, encoder.decode(latents).shape
        (torch.Size([2, 4, 4, 4]), torch.Size([2, 3, 32, 32]))
    """

    def __init__(self, vae: Any, *, cache: str | Path = "none") -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        self.cache = None if cache == "none" else EncodingCache(cache, self)
        self._values = dict[int, set[int]]()
        self.num_images = 0
        self.eval()

    @property
    def scale(self) -> int:
        """Pixels for each row of latents."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def train(self, mode: bool = True) -> "LatentEncoder":
        """Stay in evaluation mode: the autoencoder is frozen."""
        return super().train(False)

    def forward(self, images: Tensor | Cached | Cacheable, *, at_mean: bool = False) -> Tensor:
        """Encode images in [0, 1].

        Args:
            images: Shape ``(B, 3, H, W)``, or what :meth:`look_up` returned.
            at_mean: Whether to take the most probable latents instead of random ones.

        Returns:
            Latents, shape ``(B, c, H / scale, W / scale)``, of about unit variance.

        Raises:
            ValueError: If the size of the images is no multiple of the scale.
        """
        moments = images.moments if isinstance(images, Cached) else self._moments(images)
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution  # imports all autoencoders

        distribution = DiagonalGaussianDistribution(moments)
        latents = distribution.mode() if at_mean else distribution.sample()
        return latents * self.vae.config.scaling_factor

    def look_up(self, images: Tensor, *integers: Tensor) -> Cached | Cacheable | Tensor:
        """Replace images on the CPU by their encodings in the cache, or mark them to be cached when they are encoded.

        To be called before a batch goes to the device, so that cached images are not copied and no step waits.

        Args:
            images: Shape ``(B, 3, H, W)``.
            integers: What a batch tells of the samples by integers, each of shape ``(B,)``: their index in the training
                set, maybe labels. The one with the most values counts the samples.

        Raises:
            ValueError: If more is cached than each sample's image and mirror image, since it would grow without end.
        """
        if self.cache is None:
            return images
        for place, values in enumerate(integers):
            self._values.setdefault(place, set()).update(values.tolist())
        if integers:
            num_samples = max(self.num_images, *map(len, self._values.values()))
            if self.cache.num_written > 2 * num_samples:
                raise ValueError(
                    "Argument `cache_latents` expected images that are always the same, or mirrored, but got "
                    f"{self.cache.num_written} different ones of {num_samples} samples. Switch off other random "
                    "changes of images, or the cache with cache_latents=none."
                )
        keys = self.cache.keys(images)
        found = self.cache.get(keys)
        return Cacheable(images, keys) if found is None else Cached(found[0])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [0, 1]."""
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
        # Contiguous, whatever the autoencoder's memory format: `randn_like` numbers its values in memory order.
        moments: Tensor = distribution.parameters.contiguous()
        if isinstance(images, Cacheable) and self.cache is not None:
            self.cache.put(images.keys, [moments])
        return moments
