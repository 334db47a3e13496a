"""Building modules from checkpoints and published models, and pipelines of diffusers from modules."""

import copy
import json
from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from lightning_iet.modules.noise_processes import scheduler_class
from lightning_iet.utilities.checkpoints import outline
from lightning_iet.utilities.errors import first_line

# Classes are looked up in these lists only: a file must not name code to run.
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")
_SCALING = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
DENOISERS = ("UNet2DModel", "DiTTransformer2DModel")
_MODULES = {
    "DiffusionModule": "lightning_iet.modules.diffusion",
    "TextToImageModule": "lightning_iet.modules.text_to_image",
}


def specify(thing: object) -> dict[str, Any] | None:
    """Return class and configuration of a diffusers model or scheduler; None for a class that keeps no ``config``.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> specify(DDPMScheduler())["class_path"]
        'diffusers.DDPMScheduler'
    """
    config = getattr(thing, "config", None)
    if config is None or not hasattr(type(thing), "from_config"):
        return None
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in dict(config).items()}
    return {"class_path": f"diffusers.{type(thing).__name__}", "config": plain}


def build(specification: dict[str, Any]) -> Any:
    """Build what :func:`specify` described, with new weights.

    Raises:
        ValueError: For a class outside diffusers: a checkpoint must not name any callable of this machine.
    """
    module, _, name = specification["class_path"].rpartition(".")
    if module != "diffusers":
        raise ValueError(f"Checkpoint expected a class of diffusers, but got {specification['class_path']!r}.")
    return getattr(diffusers, name).from_config(specification["config"])


def check_same_architecture(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse weights of another architecture, before torch lists each of them.

    Args:
        saved: Weights of the checkpoint, by name.
        own: Weights of the module that is to take them.

    Raises:
        ValueError: Naming the first difference.

    Example:
        >>> check_same_architecture({"weight": torch.zeros(2)}, {"weight": torch.zeros(3)})
        Traceback (most recent call last):
        ...
        ValueError: The checkpoint expected another architecture, but got 1 of 1 weights that differ: 'weight' is
        of shape (2,) there, and of shape (3,) here. ...
    """
    there, here = ({name: tuple(tensor.shape) for name, tensor in weights.items()} for weights in (saved, own))
    names = {**here, **there}
    differing = [name for name in names if there.get(name) != here.get(name)]
    if differing:
        name = differing[0]
        in_file, in_module = (f"of shape {shapes[name]}" if name in shapes else "missing" for shapes in (there, here))
        raise ValueError(
            f"The checkpoint expected another architecture, but got {len(differing)} of {len(names)} weights that "
            f"differ: '{name}' is {in_file} there, and {in_module} here. Use the settings of the run that wrote it."
        )


def given_or_pretrained(unet: nn.Module | None, pretrained: str | None) -> tuple[nn.Module, SchedulerMixin | None]:
    """Return the denoiser that was given, or load the one that was named, with its scheduler.

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
    folder = Path(source)
    is_local = folder.is_dir()
    if not is_local:
        try:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
            if not any(folder.rglob("*.safetensors")):  # older models have weights in torch's own format only
                folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.bin"]))
        except Exception as error:  # the hub's client, and the network beneath it, raise anything
            raise ValueError(
                f"Argument `pretrained` expected a folder, or a model's id on the Hugging Face hub, but got '{source}',"
                f" which is no folder here and could not be had from the hub ({first_line(error)}). Without network "
                "give a local path: the folder of a pipeline, as its save_pretrained() writes it."
            ) from error
    denoiser, scheduler = read_folder(folder)
    for part in (denoiser, scheduler):
        if part is not None:  # a local path means nothing elsewhere
            part.register_to_config(_name_or_path="" if is_local else source)  # type: ignore[operator]
    return denoiser, scheduler


def read_folder(folder: Path) -> tuple[nn.Module, SchedulerMixin | None]:
    """Load from a folder; nothing is fetched.

    Args:
        folder: Of an unconditional or class-conditional ``DDPMPipeline`` or ``DDIMPipeline``, or what an export makes
            of EDM (``model_index.json``,
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
            return _read_denoiser(folder), None
        _named_class(folder / "model_index.json", PIPELINES)
        unet, scheduler = (
            folder / part if (folder / part).is_dir() else folder  # as in the first published ones
            for part in ("unet", "scheduler")
        )
        config = json.loads((scheduler / "scheduler_config.json").read_text(encoding="utf-8"))
        kind = scheduler_class(config.get("_class_name"))
        return _read_denoiser(unet), kind.from_pretrained(scheduler, local_files_only=True)
    except Exception as error:  # damaged files make diffusers raise anything
        raise ValueError(f"{wanted} of diffusers, but got '{folder}': {first_line(error)}") from error


def _read_denoiser(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ValueError(f"there is no U-Net in it (no {folder / 'config.json'}).")
    kind = _named_class(folder / "config.json", DENOISERS)
    denoiser, found = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    # diffusers leaves what a file lacks at random values, and only logs it.
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if found.get(problem):
            raise ValueError(
                f"the weights are of another architecture than {folder / 'config.json'} "
                f"({problem.replace('_', ' ')}: {found[problem][0]} …)."
            )
    return denoiser.train()  # diffusers returns evaluation mode, and Lightning does not change it


def _named_class(config: Path, known: tuple[str, ...]) -> Any:
    """The class of diffusers that a configuration names, one of those known."""
    name = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    if name not in known:
        raise ValueError(f"{name} is none of {', '.join(known)}.")
    return getattr(diffusers, name)


def make_pipeline(denoiser: nn.Module, scheduler: SchedulerMixin) -> "diffusers.DiffusionPipeline":
    """Make a ``DDPMPipeline`` of a copy of a denoiser, and a scheduler.

    A scheduler that scales what the denoiser sees gets a ``ConsistencyModelPipeline``: ``DDPMPipeline`` does not scale.

    Args:
        denoiser: A U-Net or transformer of diffusers.
        scheduler: A sampler of diffusers.

    Returns:
        The pipeline, on the CPU, in evaluation mode, without a progress bar.

    Raises:
        TypeError: If the denoiser is another one.
        ValueError: If no pipeline of diffusers samples images with that scheduler alone.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> make_pipeline(nn.Identity(), DDPMScheduler())
        Traceback (most recent call last):
        ...
        TypeError: Argument `unet` expected a UNet2DModel or DiTTransformer2DModel of diffusers to make a pipeline of,
        but got Identity. ...
    """
    if type(denoiser).__name__ not in DENOISERS or not hasattr(denoiser, "save_pretrained"):
        raise TypeError(
            f"Argument `unet` expected a {' or '.join(DENOISERS)} of diffusers to make a pipeline of, "
            f"but got {type(denoiser).__name__}. Keep its checkpoint instead."
        )
    if "generator" not in signature(scheduler.step).parameters:
        raise ValueError(
            f"Argument `sampler` expected 'ddim' or 'ddpm' for a pipeline, but got 'own', a {type(scheduler).__name__},"
            " whose images no pipeline of diffusers draws without a prompt. Swap the scheduler after loading."
        )
    own = copy.deepcopy(denoiser).cpu().float().eval().requires_grad_(False)
    # Files of weights hold them row by row, whatever order training had them in (`channels_last`).
    own = own.to(memory_format=torch.contiguous_format)
    scales = float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0 or type(scheduler).__name__ in _SCALING
    kind = diffusers.ConsistencyModelPipeline if scales else diffusers.DDPMPipeline
    pipeline = kind(unet=own, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_any_module(path: Path, *, argument: str = "ckpt") -> Any:
    """Load a module of the class that its checkpoint names.

    Args:
        path: A checkpoint.
        argument: The name under which the user gave it.

    Returns:
        The module, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else.
    """
    name = outline(path, argument=argument).get("specification", {}).get("module", "DiffusionModule")
    wanted = f"Argument `{argument}` expected a checkpoint of a {' or '.join(_MODULES)}, but got '{path}'"
    if name not in _MODULES:
        raise ValueError(f"{wanted}, which is one of a {name}.")
    try:
        return getattr(import_module(_MODULES[name]), name).load_from_checkpoint(path, map_location="cpu")
    except (ValueError, ImportError):
        raise
    except Exception as error:  # torch and pickle raise anything on a file of another kind
        raise ValueError(f"{wanted}: {first_line(error)}") from error
