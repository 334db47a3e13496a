"""Models that somebody has published: a pipeline or a U-Net of diffusers, from a folder or from the hub."""

import json
from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from torch import nn

from lightning_iet.utilities.errors import first_line

__all__ = ["DENOISERS", "PIPELINES", "SCHEDULERS", "either", "load_pretrained", "read_folder"]

# Classes are picked from lists of ours: a file must not name code to run.
PIPELINES = ("DDPMPipeline", "DDIMPipeline")
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
DENOISERS = ("UNet2DModel", "DiTTransformer2DModel")


def either(unet: nn.Module | None, pretrained: str | None) -> tuple[nn.Module, SchedulerMixin | None]:
    """The denoiser that was given, or the one that was named, with its scheduler.

    Raises:
        ValueError: If there are none or both, or see :func:`load_pretrained`.
    """
    if pretrained is not None and unet is None:
        return load_pretrained(pretrained)
    if unet is not None and pretrained is None:
        return unet, None
    raise ValueError(
        f"Arguments `unet` and `pretrained` expected one of them, but got {'neither' if unet is None else 'both'}. "
        "With --model.pretrained also give --model.unet null, if the configuration has a `unet`."
    )


def load_pretrained(source: str) -> tuple[nn.Module, SchedulerMixin | None]:
    """Load a denoiser, and the noise schedule that it was trained with.

    Args:
        source: A folder, see :func:`read_folder`, or the id of such a model on the Hugging Face hub, which is
            downloaded unless it lies in the cache.

    Returns:
        The denoiser in training mode, and the scheduler; None if a denoiser comes without.

    Raises:
        ValueError: If there is no such model, no network, or the folder holds something else.
    """
    if Path(source).is_dir():
        return _named("", read_folder(Path(source)))  # a path of this machine means nothing to whom the model is given
    try:
        folder = _download(source)
    except Exception as error:  # the hub's client, and the network beneath it, raise anything
        raise ValueError(
            f"Argument `pretrained` expected a folder, or a model's id on the Hugging Face hub, but got '{source}', "
            f"which is no folder here and could not be had from the hub ({first_line(error)}). Without network give "
            "a local path: the folder of a pipeline, as its save_pretrained() writes it."
        ) from error
    return _named(source, read_folder(folder))


def _named(name: str, model: tuple[nn.Module, SchedulerMixin | None]) -> tuple[nn.Module, SchedulerMixin | None]:
    for part in model:
        if part is not None:
            part.register_to_config(_name_or_path=name)  # type: ignore[operator]
    return model


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors"]))
    if not any(folder.rglob("*.safetensors")):  # older models have weights in torch's own format only
        folder = Path(snapshot_download(model, allow_patterns=["*.json", "*.bin"]))
    return folder


def read_folder(folder: Path) -> tuple[nn.Module, SchedulerMixin | None]:
    """Load from a folder; nothing is fetched.

    Args:
        folder: Of an unconditional or class-conditional ``DDPMPipeline`` or ``DDIMPipeline`` (``model_index.json``,
            with its parts in ``unet`` and ``scheduler`` or, as in the first published ones, beside it), or of a
            denoiser alone (``config.json``).

    Returns:
        See :func:`load_pretrained`.

    Raises:
        ValueError: If it holds something else.
    """
    wanted = f"Argument `pretrained` expected a folder with a {' or '.join(PIPELINES)}, or a {' or '.join(DENOISERS)}"
    try:
        if not (folder / "model_index.json").is_file():
            return _denoiser(folder), None
        _known(_read(folder / "model_index.json").get("_class_name"), PIPELINES)
        return _denoiser(_part(folder, "unet")), _scheduler(_part(folder, "scheduler"))
    except Exception as error:  # damaged files make diffusers raise anything
        raise ValueError(f"{wanted} of diffusers, but got '{folder}': {first_line(error)}") from error


def _part(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _denoiser(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise ValueError(f"there is no U-Net in it (no {folder / 'config.json'}).")
    kind = _known(_read(folder / "config.json").get("_class_name"), DENOISERS)
    denoiser, found = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, output_loading_info=True)
    # diffusers leaves what a file lacks at random values, and only logs it.
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if found.get(problem):
            raise ValueError(
                f"the weights are of another architecture than {folder / 'config.json'} "
                f"({problem.replace('_', ' ')}: {found[problem][0]} …)."
            )
    return denoiser.train()  # which comes in evaluation mode, and Lightning leaves modes alone: no dropout


def _scheduler(folder: Path) -> Any:
    kind = _known(_read(folder / "scheduler_config.json").get("_class_name"), SCHEDULERS)
    return getattr(diffusers, kind).from_pretrained(folder, local_files_only=True)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _known(name: Any, known: tuple[str, ...]) -> str:
    if name not in known:
        raise ValueError(f"{name} is none of {', '.join(known)}.")
    return str(name)
