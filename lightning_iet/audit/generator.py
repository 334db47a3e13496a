"""The diffusion model that is audited, from a checkpoint or from a folder of diffusers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from lightning_iet.audit.cache import digest, hash_weights
from lightning_iet.modules import DiffusionModule
from lightning_iet.modules.loading import load_any_module
from lightning_iet.modules.pretrained import PIPELINES, SCHEDULERS
from lightning_iet.modules.specification import specify
from lightning_iet.utilities.errors import first_line

__all__ = ["Generator", "load_checkpoint", "load_pipeline"]


@dataclass(frozen=True, eq=False)
class Generator:
    """A diffusion model that is audited.

    Attributes:
        module: draws images, and tells losses.
        location: where it comes from, for people.
        sha256: hash of all that its images depend on: the weights that draw, and how they are used.
        use_ema: whether the averaged weights are meant.
    """

    module: DiffusionModule
    location: str
    sha256: str
    use_ema: bool


def load_checkpoint(path: Path, *, use_ema: bool = True) -> Generator:
    """Load a checkpoint of a :class:`~lightning_iet.modules.DiffusionModule`.

    Args:
        path: the file.
        use_ema: take the averaged weights, if there are any.

    Returns:
        The generator, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else.
    """
    module = load_any_module(path)
    if not isinstance(module, DiffusionModule):
        raise ValueError(
            f"Argument `ckpt` expected a checkpoint of a DiffusionModule, but got '{path}', "
            f"which is one of a {type(module).__name__}."
        )
    network = module.ema if use_ema and module.ema is not None else module.unet
    return Generator(module, str(path), _hash(module, network), use_ema and module.ema is not None)


def load_pipeline(folder: Path) -> Generator:
    """Load an unconditional ``DDPMPipeline`` or ``DDIMPipeline`` of diffusers from the disk; nothing is fetched.

    Args:
        folder: as ``save_pretrained`` writes it: ``model_index.json``, ``unet`` and ``scheduler``.

    Returns:
        The generator, on the CPU.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds something else.
    """
    wanted = "Argument `pipeline` expected a folder with an unconditional DDPMPipeline or DDIMPipeline of diffusers"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{wanted}, but got '{folder}', which has no model_index.json. Check the path.")
    try:
        scheduler = _scheduler(folder)
        unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet", local_files_only=True)
        _check_unconditional(unet)
    except Exception as error:  # damaged files make diffusers raise anything
        raise ValueError(f"{wanted}, but got '{folder}': {first_line(error)}") from error
    module = DiffusionModule(unet, scheduler=scheduler, ema_decay=0)
    return Generator(module, str(folder), _hash(module, unet), use_ema=False)


def _scheduler(folder: Path) -> Any:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    scheduler = index.get("scheduler", [None, None])[1]
    # Classes are picked from a list of ours: a file must not name code to run.
    for name, known in ((index.get("_class_name"), PIPELINES), (scheduler, SCHEDULERS)):
        if name not in known:
            raise ValueError(f"{name} is none of {', '.join(known)}.")
    return getattr(diffusers, scheduler).from_pretrained(folder, subfolder="scheduler", local_files_only=True)


def _check_unconditional(unet: Any) -> None:
    config = unet.config
    if config.num_class_embeds is not None or config.class_embed_type is not None:
        raise ValueError("it draws images of a class that is given, which this audit does not do.")
    if config.in_channels not in (1, 3):
        raise ValueError(f"it draws images of {config.in_channels} channels, which are neither grey nor in colour.")
    if config.in_channels != config.out_channels:
        raise ValueError(f"it predicts {config.out_channels} channels for images of {config.in_channels}.")


def _hash(module: DiffusionModule, network: nn.Module) -> str:
    return digest(_configuration(module.unet), _configuration(module.scheduler), hash_weights(network))


def _configuration(thing: object) -> str:
    """A configuration without private keys, among which is the folder that it was read from."""
    found = specify(thing) or {"class_path": type(thing).__name__, "config": {}}
    public = {key: value for key, value in found["config"].items() if not key.startswith("_")}
    return json.dumps([found["class_path"], public], sort_keys=True, default=str)
