"""A module from its checkpoint, whatever its class."""

import copy
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMPipeline, SchedulerMixin
from torch import Tensor, nn

from lightning_iet.utilities.checkpoints import check_whole, outline
from lightning_iet.utilities.errors import first_line


def specify(thing: object) -> dict[str, Any] | None:
    """Class and configuration of a diffusers model or scheduler; None for a class that keeps no ``config``.

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


# Classes are picked from lists of ours: a file must not name code to run.
PIPELINES = ("DDPMPipeline", "DDIMPipeline")
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
DENOISERS = ("UNet2DModel", "DiTTransformer2DModel")


def given_or_pretrained(unet: nn.Module | None, pretrained: str | None) -> tuple[nn.Module, SchedulerMixin | None]:
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


def make_pipeline(denoiser: nn.Module, scheduler: SchedulerMixin) -> DDPMPipeline:
    """Put copies of a denoiser and its scheduler into a ``DDPMPipeline``.

    Args:
        denoiser: A U-Net or transformer of diffusers.
        scheduler: A sampler of diffusers.

    Returns:
        The pipeline, on the CPU, in evaluation mode, without a progress bar.

    Raises:
        TypeError: If the denoiser is another one.

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
    own = copy.deepcopy(denoiser).cpu().float().eval().requires_grad_(False)
    # Files of weights hold them row by row, whatever order training had them in (`channels_last`).
    own = own.to(memory_format=torch.contiguous_format)
    pipeline = DDPMPipeline(unet=own, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Classes are picked from a list of ours: a checkpoint must not name code to run.
_CLASSES = {
    "DiffusionModule": "lightning_iet.modules.diffusion",
    "TextToImageModule": "lightning_iet.modules.text_to_image",
}


def load_any_module(path: Path, *, argument: str = "ckpt") -> Any:
    """Load a module of the class that its checkpoint names, or say in one line why that file is none.

    Args:
        path: A checkpoint.
        argument: The name under which the user gave it.

    Returns:
        The module, on the CPU: it can draw images (``sample``) and be handed on (``pipeline``).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else.
    """
    check_whole(path, argument=argument)
    name = outline(path, argument=argument).get("specification", {}).get("module", "DiffusionModule")
    wanted = f"Argument `{argument}` expected a checkpoint of a {' or '.join(_CLASSES)}, but got '{path}'"
    if name not in _CLASSES:
        raise ValueError(f"{wanted}, which is one of a {name}.")
    try:
        return getattr(import_module(_CLASSES[name]), name).load_from_checkpoint(path, map_location="cpu")
    except (ValueError, ImportError):
        raise
    except Exception as error:  # torch and pickle raise anything on a file of another kind
        raise ValueError(f"{wanted}: {first_line(error)}") from error
