"""Building modules from checkpoints and published models, and pipelines of diffusers from modules."""

import copy
import json
import logging
import re
from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_iet.modules.noise_processes import scheduler_class
from lightning_iet.utilities.checkpoints import outline
from lightning_iet.utilities.errors import first_line

log = logging.getLogger(__name__)

# Classes are looked up in these lists only: a file must not name code to run.
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")
_SCALING = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
DENOISERS = ("UNet2DModel", "DiTTransformer2DModel")
_MODULES = {
    "DiffusionModule": "lightning_iet.modules.diffusion",
    "TextToImageModule": "lightning_iet.modules.text_to_image",
}


def specify(thing: object) -> dict[str, Any] | None:
    """Return class and configuration of a diffusers model or scheduler; None for a class that diffusers does not have.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> specify(DDPMScheduler())["class_path"]
        'diffusers.DDPMScheduler'
    """
    name = type(thing).__name__
    if getattr(diffusers, name, None) is not type(thing) or not hasattr(type(thing), "from_config"):
        return None
    config: Any = thing.config  # type: ignore[attr-defined]
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in dict(config).items()}
    return {"class_path": f"diffusers.{name}", "config": plain}


def build(specification: dict[str, Any]) -> Any:
    """Build what :func:`specify` described, with new weights.

    Raises:
        ValueError: For a class outside diffusers: a checkpoint must not name any callable of this machine.
    """
    module, _, name = specification["class_path"].rpartition(".")
    kind = getattr(diffusers, name, None) if module == "diffusers" else None
    if kind is None:
        raise ValueError(
            f"Checkpoint expected a class of diffusers, but got {specification['class_path']!r}. Give an object of "
            "your own class to load_from_checkpoint: unet=YourDenoiser(…), or scheduler=YourScheduler(…)."
        )
    return kind.from_config(specification["config"])


def check_same_architecture(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse weights, by name, of another architecture than a module's own, before torch lists each of them.

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


def given_or_pretrained(
    unet: nn.Module | None, pretrained: str | None, scheduler: SchedulerMixin | None = None
) -> tuple[nn.Module, SchedulerMixin | None]:
    """Return the denoiser that was given, or load the one that was named, with its scheduler, unless one was given.

    Raises:
        ValueError: If there are none or both, if a published denoiser comes without the noise schedule that it was
            trained with and none is given, or see :func:`load_pretrained`.
    """
    if pretrained is not None and unet is None:
        denoiser, published = load_pretrained(pretrained)
        if published is None and scheduler is None:
            raise ValueError(
                f"Argument `scheduler` expected the noise schedule that '{pretrained}' was trained with, since none "
                "lies beside it, but got None. Give it (--model.scheduler diffusers.DDPMScheduler is linear, with "
                "--model.scheduler.beta_schedule squaredcos_cap_v2 a cosine), or the folder of the whole pipeline."
            )
        return denoiser, published if scheduler is None else scheduler  # some have no truth value
    if unet is not None and pretrained is None:
        return unet, scheduler
    raise ValueError(
        f"Arguments `unet` and `pretrained` expected one of them, but got {'neither' if unet is None else 'both'}. "
        "With --model.pretrained also give --model.unet null, if the configuration has a `unet`."
    )


def load_pretrained(source: str) -> tuple[nn.Module, SchedulerMixin | None]:
    """Load a denoiser, and the noise schedule that it was trained with.

    Args:
        source: A folder, see :func:`read_folder`; a denoiser's ``.safetensors`` file with its ``config.json`` beside
            it; or the id of such a model on the Hugging Face hub, which is downloaded unless it lies in the cache.

    Returns:
        The denoiser in training mode, and the scheduler; None if a denoiser comes without.

    Raises:
        ValueError: If there is no such model, no network, or the folder holds something else.
    """
    folder = Path(source)
    is_local = folder.exists()
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
    denoiser, scheduler = read_file(folder) if folder.is_file() else read_folder(folder)
    for part in (denoiser, scheduler):
        if part is not None:  # a local path means nothing elsewhere
            part.register_to_config(_name_or_path="" if is_local else source)  # type: ignore[operator]
    return denoiser, scheduler


def read_folder(folder: Path) -> tuple[nn.Module, SchedulerMixin | None]:
    """Load from a folder; nothing is fetched.

    Args:
        folder: Of a pipeline (``model_index.json``): an unconditional or class-conditional ``DDPMPipeline`` or
            ``DDIMPipeline``, or what an export makes of EDM. Its parts lie in ``unet`` and ``scheduler`` or, as in the
            first published ones, beside that file. Or of a denoiser (``config.json``), whose scheduler may lie in the
            folder ``scheduler`` beside it.

    Returns:
        See :func:`load_pretrained`.

    Raises:
        ValueError: If it holds something else.
    """
    wanted = f"Argument `pretrained` expected a folder with a {' or '.join(PIPELINES)}, or a {' or '.join(DENOISERS)}"
    try:
        if not (folder / "model_index.json").is_file():
            return _read_denoiser(folder), _scheduler_beside(folder)
        _named_class(folder / "model_index.json", PIPELINES)
        unet, scheduler = (
            folder / part if (folder / part).is_dir() else folder  # as in the first published ones
            for part in ("unet", "scheduler")
        )
        return _read_denoiser(unet), _read_scheduler(scheduler)
    except Exception as error:  # damaged files make diffusers raise anything
        raise ValueError(f"{wanted} of diffusers, but got '{folder}': {first_line(error)}") from error


def read_file(file: Path) -> tuple[nn.Module, SchedulerMixin | None]:
    """Load the weights of a denoiser from one file, with the ``config.json`` beside it.

    Raises:
        ValueError: If it is no ``.safetensors`` file, nothing says what network it belongs to, or another one.
    """
    wanted = f"Argument `pretrained` expected a folder, or a .safetensors file of a {' or '.join(DENOISERS)}"
    config = file.with_name("config.json")
    if file.suffix != ".safetensors" or not config.is_file():
        raise ValueError(
            f"{wanted} with its config.json beside it, but got '{file}', and "
            + (f"there is no '{config}'" if file.suffix == ".safetensors" else "it is another file")
            + ". Put it there; a single file of Stable Diffusion goes to TextToImageModule."
        )
    try:
        denoiser = _named_class(config, DENOISERS).from_config(json.loads(config.read_text(encoding="utf-8")))
        weights = load_file(file)
        check_same_architecture(weights, denoiser.state_dict())
        denoiser.load_state_dict(weights)
        return denoiser.train(), _scheduler_beside(file.parent)
    except Exception as error:  # damaged files make diffusers and safetensors raise anything
        raise ValueError(f"{wanted}, but got '{file}': {first_line(error)}") from error


def _read_scheduler(folder: Path) -> Any:
    config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    return scheduler_class(config.get("_class_name")).from_pretrained(folder, local_files_only=True)


def _scheduler_beside(folder: Path) -> Any:
    """The noise schedule of a pipeline of which only the denoiser's folder was given; None where there is none."""
    for scheduler in (folder, folder.resolve().parent / "scheduler"):
        if (scheduler / "scheduler_config.json").is_file():
            log.warning("The noise schedule of '%s' is taken from '%s'.", folder, scheduler)
            return _read_scheduler(scheduler)
    return None


def _read_denoiser(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        inside = [child.name for child in sorted(folder.iterdir()) if (child / "config.json").is_file()]
        instead = f" Give one of its folders: {', '.join(inside)}." if inside else ""
        raise ValueError(f"there is no U-Net in it (no {folder / 'config.json'}).{instead}")
    kind = _named_class(folder / "config.json", DENOISERS)
    which = which_weights(folder)
    denoiser, found = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **which)
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
    """Make a ``DDPMPipeline`` of a copy of a denoiser, and a scheduler that samples.

    A scheduler that scales what the denoiser sees gets a ``ConsistencyModelPipeline``: ``DDPMPipeline`` does not scale.

    Returns:
        The pipeline, on the CPU, in evaluation mode, without a progress bar.

    Raises:
        TypeError: If the denoiser is none of diffusers'.
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


def load_any_module(path: Path, *, argument: str = "ckpt", content: dict[str, Any] | None = None) -> Any:
    """Load a module of the class that its checkpoint names, on the CPU.

    Args:
        path: The file.
        argument: The name under which the user gave it.
        content: Its :func:`~lightning_iet.utilities.checkpoints.outline`, which is read where it is not given.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else.
    """
    content = outline(path, argument=argument) if content is None else content
    specification = content.get("specification")
    if not isinstance(specification, dict):
        raise ValueError(
            f"Argument `{argument}` expected a checkpoint of `lightning-iet fit`, but got '{path}', which is none: it "
            "does not say what its model is. A pipeline of diffusers can be audited with "
            "`lightning-iet audit-model --pipeline FOLDER`."
        )
    name = specification.get("module", "DiffusionModule")
    wanted = f"Argument `{argument}` expected a checkpoint of a {' or '.join(_MODULES)}, but got '{path}'"
    if name not in _MODULES:
        raise ValueError(f"{wanted}, which is one of a {name}.")
    if name == "DiffusionModule" and specification.get("unet") is None:
        raise ValueError(
            f"{wanted}, which does not say how to build its denoiser: that is none of diffusers. In Python, "
            "DiffusionModule.load_from_checkpoint(path, unet=…) takes one."
        )
    try:
        return getattr(import_module(_MODULES[name]), name).load_from_checkpoint(path, map_location="cpu")
    except (ValueError, ImportError):
        raise
    except Exception as error:  # torch and pickle raise anything on a file of another kind
        raise ValueError(f"{wanted}: {first_line(error)}") from error


_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<variant>(?!safetensors|bin)[^.]+?))?(?:-\d+-of-\d+)?\.(?P<suffix>safetensors|bin)"
)


def which_weights(folder: Path) -> dict[str, Any]:
    """Find out which weights ``from_pretrained`` has to take: plain ones, or else the only variant that is there.

    Weights are often published in half precision alone (``diffusion_pytorch_model.fp16.safetensors``), which
    diffusers finds only by the variant's name.

    Args:
        folder: Of a model, with its ``config.json``; or of a pipeline, whose parts are looked at together.

    Returns:
        ``variant`` and ``use_safetensors`` for ``from_pretrained``; nothing where there are no weights at all.

    Raises:
        ValueError: If there are several variants and none is the plain one, naming them.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
        ...     which_weights(Path(folder))
        {'variant': 'fp16', 'use_safetensors': True}
    """
    parts = [folder, *(child for child in sorted(folder.iterdir()) if child.is_dir())]
    found = {part: _variants(part) for part in parts}
    found = {part: variants for part, variants in found.items() if variants}
    if not found:
        return {}
    lacking = {part: sorted(map(str, variants)) for part, variants in found.items() if None not in variants}
    if len({name for names in lacking.values() for name in names}) > 1:
        part, names = next(iter(lacking.items()))
        names = sorted({name for names in lacking.values() for name in names})
        raise ValueError(
            f"'{part}' holds weights of the variants {', '.join(names)} and no plain ones, such as "
            f"diffusion_pytorch_model.safetensors: which of them is not known. Leave one there."
        )
    variant = next(iter(lacking.values()))[0] if lacking else None
    if variant is not None:
        log.warning("'%s' holds weights of the variant '%s' alone; these are taken, in float32.", folder, variant)
    safe = ["safetensors" in variants.get(variant, variants.get(None, set())) for variants in found.values()]
    # Where some parts have them and others do not, diffusers looks for itself.
    return {"variant": variant} | ({"use_safetensors": safe[0]} if len(set(safe)) == 1 else {})


def _variants(folder: Path) -> dict[str | None, set[str]]:
    """The suffixes of a folder's weight files by variant; plain ones are None."""
    found: dict[str | None, set[str]] = {}
    for match in (_FILE.fullmatch(file.name) for file in folder.iterdir()):
        if match is not None:
            found.setdefault(match["variant"], set()).add(match["suffix"])
    return found
