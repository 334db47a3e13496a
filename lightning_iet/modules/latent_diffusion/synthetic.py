"""Tiny text-to-image pipelines of the real classes, with random weights: to try out a run without the real ones."""

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import diffusers

from lightning_iet.functional.diffusion import PredictionType
from lightning_iet.utilities.imports import require
from lightning_iet.utilities.random import isolated_rng

__all__ = ["synthetic_pipeline"]

# The noise schedule of Stable Diffusion.
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_EXTRA = "text-to-image"


def synthetic_pipeline(
    kind: Literal["sd", "sdxl"] = "sd",
    *,
    prediction_type: PredictionType = "epsilon",
    image_size: int = 256,
    vae_scale: int = 8,
    seed: int = 0,
) -> Any:
    """Build a pipeline that has everything a published one has, in milliseconds and some kilobytes.

    Args:
        kind: ``"sd"`` (Stable Diffusion 1.x and 2.x) or ``"sdxl"``, with two text encoders and time ids.
        prediction_type: What the U-Net predicts.
        image_size: Height and width of the images in pixels.
        vae_scale: Pixels for each row of latents, a power of 2.
        seed: Of the weights.

    Returns:
        A ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``.

    Example:
        >>> pipeline = synthetic_pipeline("sdxl", image_size=16, vae_scale=2)
        >>> type(pipeline).__name__, pipeline.unet.config.sample_size
        ('StableDiffusionXLPipeline', 8)
    """
    transformers = require("transformers", _EXTRA)
    is_xl = kind == "sdxl"
    with isolated_rng(seed):
        parts = {
            "vae": _autoencoder(vae_scale),
            "text_encoder": transformers.CLIPTextModel(_text_config(8)),
            "tokenizer": _tokenizer(),
            "unet": _unet(image_size // vae_scale, is_xl=is_xl),
        }
        if is_xl:
            second = transformers.CLIPTextModelWithProjection(_text_config(12))
            scheduler = diffusers.EulerDiscreteScheduler(**_BETAS, prediction_type=prediction_type)
            extra = {"text_encoder_2": second, "tokenizer_2": _tokenizer(), "add_watermarker": False}
            pipeline = diffusers.StableDiffusionXLPipeline(**parts, **extra, scheduler=scheduler)
        else:
            scheduler = diffusers.DDIMScheduler(
                **_BETAS, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False, steps_offset=1
            )
            none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = diffusers.StableDiffusionPipeline(**parts, **none, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _autoencoder(scale: int) -> Any:
    levels = scale.bit_length()
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=2,
    )


def _unet(sample_size: int, *, is_xl: bool) -> Any:
    # SDXL's extra embedding takes 6 time ids, 8 numbers each, beside the 12 of the pooled text.
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8} if is_xl else {}
    return diffusers.UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=20 if is_xl else 8,
        projection_class_embeddings_input_dim=6 * 8 + 12 if is_xl else None,
        **added,
    )


def _text_config(size: int) -> Any:
    return require("transformers", _EXTRA).CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=size,
        intermediate_size=16,
        projection_dim=size,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=len(_vocabulary()) - 2,
        eos_token_id=len(_vocabulary()) - 1,
        pad_token_id=len(_vocabulary()) - 1,
    )


def _vocabulary() -> dict[str, int]:
    """Every byte by itself, within a word and at its end, in the letters that GPT-2's byte-level code gives them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + number) for number in range(256 - len(printable))]
    letters = [chr(byte) for byte in printable] + others
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


def _tokenizer() -> Any:
    transformers = require("transformers", _EXTRA)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(_vocabulary()), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)
