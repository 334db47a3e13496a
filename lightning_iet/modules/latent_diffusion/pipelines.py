"""Published text-to-image pipelines, loaded from a folder or a hub, or refused in one line."""

import logging
import os
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from lightning_iet.modules.latent_diffusion.synthetic import synthetic_pipeline
from lightning_iet.utilities.errors import first_line
from lightning_iet.utilities.imports import require

__all__ = ["PIPELINES", "load_pipeline", "open_pipeline"]

log = logging.getLogger(__name__)

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def open_pipeline(
    pretrained: str | Path | None, *, synthetic: bool = False, image_size: int | tuple[int, int] | None = None
) -> Any:
    """A published pipeline, or a synthetic one in its place, which the log says.

    Args:
        pretrained: See :func:`load_pipeline`.
        synthetic: Whether to build a tiny one with random weights, like Stable Diffusion 2.1 in kind.
        image_size: Of the synthetic one.

    Raises:
        ValueError: If there is neither.
    """
    if synthetic:
        instead = "of a published model" if pretrained is None else f"of {pretrained}"
        log.warning("SYNTHETIC MODEL: tiny random weights in the place %s; its images are noise.", instead)
        size = image_size or 256
        return synthetic_pipeline(prediction_type="v_prediction", image_size=size if isinstance(size, int) else size[0])
    if pretrained is None:
        raise ValueError(
            "Argument `pretrained` expected a folder with a diffusers pipeline, or its id on the Hugging Face hub, but "
            "got none. Give one, or try without: synthetic=true."
        )
    return load_pipeline(pretrained)


def load_pipeline(pretrained: str | Path) -> Any:
    """Load a pipeline of Stable Diffusion's class, in float32 and without a safety checker.

    Args:
        pretrained: A folder as ``save_pretrained`` writes it, or the id of such a pipeline on the Hugging Face hub,
            ``"org/name"``, which is downloaded unless it lies in the cache.

    Returns:
        A ``StableDiffusionPipeline`` (1.x and 2.x) or ``StableDiffusionXLPipeline``.

    Raises:
        FileNotFoundError: If there is no such folder, or the hub cannot be reached.
        ValueError: If the pipeline is of another class, lacks a part, or is damaged.
    """
    require("transformers", "text-to-image")
    kind = _check_parts(_index(pretrained), pretrained)
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        unet = _load_unet(pretrained)
        pipeline = getattr(diffusers, kind).from_pretrained(
            pretrained, unet=unet, **(none if kind == PIPELINES[0] else {})
        )
    except Exception as error:  # damaged and incomplete folders make diffusers and transformers raise anything
        raise ValueError(
            f"Argument `pretrained` expected a complete {kind}, but got '{pretrained}': {first_line(error)}"
        ) from error
    _check_vae(pipeline.vae, pretrained)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.float()  # whatever precision they were saved in: they are trained, or meet what is trained
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_unet(pretrained: str | Path) -> Any:
    unet, found = diffusers.UNet2DConditionModel.from_pretrained(pretrained, subfolder="unet", output_loading_info=True)
    # diffusers leaves what a file lacks at random values, and only logs it.
    if found["missing_keys"]:
        raise ValueError(f"its U-Net lacks {len(found['missing_keys'])} weights, {found['missing_keys'][0]} the first.")
    return unet


def _index(pretrained: str | Path) -> dict[str, Any]:
    """What ``model_index.json`` says."""
    folder = Path(pretrained)
    if not folder.is_dir() and _looks_like_a_path(pretrained):
        raise FileNotFoundError(
            f"Argument `pretrained` expected a folder with a diffusers pipeline, or a hub id, but got '{pretrained}', "
            "which is no folder. Check the path."
        )
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"Argument `pretrained` expected a folder with a diffusers pipeline, but got '{pretrained}' without a "
            "model_index.json. Give the folder that `save_pretrained` has written, not one inside of it."
        )
    try:
        index: dict[str, Any] = diffusers.DiffusionPipeline.load_config(pretrained)
    except Exception as error:  # the hub's client, and the network beneath it, raise anything
        raise FileNotFoundError(
            f"Argument `pretrained` expected a folder with a diffusers pipeline, or its id on the Hugging Face hub, "
            f"but got '{pretrained}', which is no folder here and could not be had from the hub "
            f"({first_line(_root(error))}). "
            "Without network give a local path: the folder of a pipeline, as its save_pretrained() writes it."
        ) from error
    return index


def _looks_like_a_path(pretrained: str | Path) -> bool:
    """Whether it cannot be a hub id, which is ``org/name``."""
    text = os.fspath(pretrained)
    return isinstance(pretrained, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1


def _check_parts(index: dict[str, Any], pretrained: str | Path) -> str:
    """Name of the pipeline's class, one of those that we know, of which each part is there."""
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise ValueError(
            f"Argument `pretrained` expected a pipeline of class {' or '.join(PIPELINES)}, but got '{pretrained}' of "
            f"class {kind}. Use DiffusionModule for unconditional models."
        )
    needed = ["unet", "vae", "scheduler", "text_encoder", "tokenizer"]
    needed += ["text_encoder_2", "tokenizer_2"] if kind == PIPELINES[1] else []
    folder = Path(pretrained)
    missing = [part for part in needed if None in index.get(part, [None])]
    missing = missing or [part for part in needed if folder.is_dir() and not (folder / part).is_dir()]
    if missing:
        raise ValueError(
            f"Argument `pretrained` expected a {kind} with {', '.join(needed)}, but got '{pretrained}' without "
            f"{', '.join(missing)}. Give a complete pipeline."
        )
    return str(kind)


def _check_vae(vae: Any, pretrained: str | Path) -> None:
    if not isinstance(vae, diffusers.AutoencoderKL) or getattr(vae.config, "latents_mean", None) is not None:
        raise ValueError(
            f"Argument `pretrained` expected a pipeline with an AutoencoderKL whose latents are scaled by one factor, "
            f"but got '{pretrained}' with {type(vae).__name__}. Use the pipelines of Stable Diffusion 1.x, 2.x or XL."
        )


def _root(error: BaseException) -> BaseException:
    """What an error began with: diffusers says of any failure that there is no such file."""
    before = error.__cause__ or error.__context__
    return error if before is None else _root(before)
