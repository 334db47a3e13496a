"""Text-to-image pipelines: published ones from a folder or the hub, and tiny synthetic ones."""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import diffusers
from safetensors import safe_open
from torch import nn

from lightning_iet.functional.diffusion import PredictionType
from lightning_iet.modules.pretrained import which_weights
from lightning_iet.utilities.errors import first_line, require
from lightning_iet.utilities.random import isolated_rng

log = logging.getLogger(__name__)

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
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
    """Build a pipeline with all parts of a published one, with tiny random weights.

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
            pipeline = diffusers.StableDiffusionPipeline(**parts, **_NO_CHECKER, scheduler=scheduler)
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


def open_pipeline(
    pretrained: str | Path | None, *, synthetic: bool = False, image_size: int | tuple[int, int] | None = None
) -> Any:
    """Return a published pipeline, see :func:`load_pipeline`, or a tiny synthetic one in its place, with a warning.

    The synthetic one is like Stable Diffusion 2.1 in kind, of images of that size.

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
        pretrained: A folder as ``save_pretrained`` writes it; a single ``.safetensors`` file of Stable Diffusion, see
            :func:`load_single_file`; or the id of such a pipeline on the Hugging Face hub, ``"org/name"``, which is
            downloaded unless it lies in the cache.

    Returns:
        A ``StableDiffusionPipeline`` (1.x and 2.x) or ``StableDiffusionXLPipeline``.

    Raises:
        FileNotFoundError: If there is no such folder, or the hub cannot be reached.
        ValueError: If the pipeline is of another class, lacks a part, or is damaged.
    """
    require("transformers", _EXTRA)
    pipeline = load_single_file(Path(pretrained)) if Path(pretrained).is_file() else _load_folder(pretrained)
    _check_vae(pipeline.vae, pretrained)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.float()  # whatever precision they were saved in: they are trained, or meet what is trained
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_single_file(file: Path) -> Any:
    """Load a pipeline from one file in Stable Diffusion's original form, by diffusers' ``from_single_file``.

    Args:
        file: The ``.safetensors`` file. What its parts look like is read from the folder that it lies in, if that has
            a ``model_index.json`` and the configurations of the parts (no weights); else diffusers fetches it from the
            hub.

    Raises:
        FileNotFoundError: If nothing says what its parts look like, and there is no network.
        ValueError: If it is something else, or lacks weights.
    """
    wanted = "Argument `pretrained` expected a single file of Stable Diffusion"
    try:
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
    except Exception as error:  # safetensors has kinds of its own
        reason = first_line(error) if file.suffix == ".safetensors" else "it is no .safetensors file"
        raise ValueError(f"{wanted}, but got '{file}': {reason}. Convert it, or give a folder.") from error
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise ValueError(
            f"{wanted}, but got '{file}', which holds no U-Net in its original form (model.diffusion_model.…). Give "
            "the folder of a pipeline, as its save_pretrained() writes it."
        )
    beside = (file.parent / "model_index.json").is_file()
    kind = PIPELINES[any(name.startswith("conditioner.embedders.1.") for name in names)]
    if beside:
        kind = _check_parts(_index(file.parent), file.parent)
    try:
        pipeline = getattr(diffusers, kind).from_single_file(
            str(file), config=str(file.parent) if beside else None, local_files_only=beside, **_without_checker(kind)
        )
    except OSError as error:
        raise FileNotFoundError(
            f"{wanted} with the configuration of its parts, but got '{file}', for which it could not be had "
            f"({first_line(_root(error))}). Put model_index.json and the folders of the pipeline, which may be without "
            "weights, beside it."
        ) from error
    except Exception as error:  # diffusers raises anything on a file of another architecture
        raise ValueError(f"{wanted}, but got '{file}': {first_line(error)}") from error
    for part, module in pipeline.components.items():
        lacking = [n for n, p in module.named_parameters() if p.is_meta] if isinstance(module, nn.Module) else []
        if lacking:
            raise ValueError(
                f"{wanted}, but got '{file}', which lacks {len(lacking)} weights of its {part}: {lacking[0]}."
            )
    return pipeline


def _without_checker(kind: str) -> dict[str, Any]:
    return _NO_CHECKER if kind == PIPELINES[0] else {}


def _load_folder(pretrained: str | Path) -> Any:
    """The pipeline of a folder, or of the hub."""
    kind = _check_parts(_index(pretrained), pretrained)
    try:
        which = which_weights(Path(pretrained)) if Path(pretrained).is_dir() else {}
        unet = _load_unet(pretrained, which)
        return getattr(diffusers, kind).from_pretrained(pretrained, unet=unet, **which, **_without_checker(kind))
    except Exception as error:  # damaged and incomplete folders make diffusers and transformers raise anything
        raise ValueError(
            f"Argument `pretrained` expected a complete {kind}, but got '{pretrained}': {first_line(error)}"
        ) from error


def _load_unet(pretrained: str | Path, which: dict[str, Any]) -> Any:
    kind = diffusers.UNet2DConditionModel
    unet, found = kind.from_pretrained(pretrained, subfolder="unet", output_loading_info=True, **which)
    # diffusers leaves what a file lacks at random values, and only logs it.
    if found["missing_keys"]:
        raise ValueError(f"its U-Net lacks {len(found['missing_keys'])} weights, {found['missing_keys'][0]} the first.")
    return unet


def _index(pretrained: str | Path) -> dict[str, Any]:
    """The content of ``model_index.json``."""
    folder = Path(pretrained)
    if not folder.is_dir() and looks_like_a_path(pretrained):
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


def looks_like_a_path(pretrained: str | Path) -> bool:
    """Whether it cannot be a hub id, which is ``org/name``."""
    text = os.fspath(pretrained)
    return isinstance(pretrained, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1


def _check_parts(index: dict[str, Any], pretrained: str | Path) -> str:
    """Name of the pipeline's class, one of :data:`PIPELINES`, after a check that no part is missing."""
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
    """The first cause of an error: diffusers reports any failure as a missing file."""
    before = error.__cause__ or error.__context__
    return error if before is None else _root(before)
