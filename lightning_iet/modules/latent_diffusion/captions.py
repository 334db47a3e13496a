"""Captions as a denoiser reads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_iet.modules.latent_diffusion.cache import EncodingCache

__all__ = ["CaptionEncoder", "Conditions", "check_captioned"]


class Conditions(NamedTuple):
    """What a denoiser is told beside the timestep."""

    hidden: Tensor
    """A state for each token, shape ``(B, L, D)``."""
    pooled: Tensor | None = None
    """One state for the whole caption, shape ``(B, P)``: SDXL only."""

    def replaced(self, where: Tensor, other: "Conditions") -> "Conditions":
        """Those of another in the rows where ``where``, shape ``(B,)``, is true.

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
        """These, and as many rows of another, which has one, before them."""
        hidden = torch.cat([first.hidden.expand_as(self.hidden), self.hidden])
        if self.pooled is None or first.pooled is None:
            return Conditions(hidden)
        return Conditions(hidden, torch.cat([first.pooled.expand_as(self.pooled), self.pooled]))

    def arguments(self, height: int, width: int) -> dict[str, Any]:
        """What a U-Net of diffusers is called with, beside latents and timesteps.

        SDXL wants to be told the original size of an image, where it was cropped, and the target size in pixels. Here
        it is always as if nothing had been cropped. *(our choice: data sets do not tell)*
        """
        if self.pooled is None:
            return {"encoder_hidden_states": self.hidden}
        ids = self.pooled.new_tensor([height, width, 0, 0, height, width]).expand(len(self.pooled), 6)
        return {
            "encoder_hidden_states": self.hidden,
            "added_cond_kwargs": {"text_embeds": self.pooled, "time_ids": ids},
        }

    def to(self, device: torch.device) -> "Conditions":
        """The same on a device."""
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
        >>> from lightning_iet.modules.latent_diffusion.synthetic import synthetic_pipeline
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
        """What is frozen stays in evaluation mode."""
        return super().train(False)

    def forward(self, captions: Sequence[str], *, keep: bool = False) -> Conditions:
        """Encode captions, on the device of the encoders; tokens beyond the encoders' length are cut off.

        Args:
            captions: B texts.
            keep: Whether what is new goes into the cache.
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
        """What guidance takes for no caption, one row: that of the empty one, or zeros where the pipeline does so."""
        if self._null is None:
            null = self._encode([""])
            if self.null_is_zero and null.pooled is not None:
                null = Conditions(torch.zeros_like(null.hidden), torch.zeros_like(null.pooled))
            self._null = null
        return self._null.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the encoders are."""
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
