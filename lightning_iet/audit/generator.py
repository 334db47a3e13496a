"""What an audit takes from a generator: images, and its loss on real ones; block by block, kept on disk."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import diffusers
import torch
from torch import Tensor, nn

from lightning_iet.audit.cache import BlockCache, Progress, in_blocks
from lightning_iet.audit.reading import ImageSet, image_set
from lightning_iet.data.decoding import Fit
from lightning_iet.data.formats import ValueRange, parse_range
from lightning_iet.evaluation.membership import choose_images, losses_at, spread_timesteps
from lightning_iet.functional.checks import check_at_least
from lightning_iet.modules import DiffusionModule
from lightning_iet.modules.base import averaged_network
from lightning_iet.modules.noise_processes import Sampler, scheduler_class
from lightning_iet.modules.pretrained import PIPELINES, load_any_module, specify, which_weights
from lightning_iet.utilities.checkpoints import outline
from lightning_iet.utilities.errors import first_line
from lightning_iet.utilities.fingerprints import digest, hash_weights


@dataclass(frozen=True, eq=False)
class Generator:
    """A diffusion model that is audited.

    Attributes:
        module: draws images, and tells losses.
        location: where it comes from, for people.
        sha256: hash of all that its images depend on: the weights that draw, and how they are used.
        use_ema: whether the averaged weights are meant.
        fit: how training images of another shape were brought to the model's, if it is known.
        value_range: what was black and white in training images of more than 8 bits, likewise.
    """

    module: DiffusionModule
    location: str
    sha256: str
    use_ema: bool
    fit: Fit | None = None
    value_range: ValueRange | None = None


def load_checkpoint(path: Path, *, use_ema: bool = True) -> Generator:
    """Load a checkpoint of a :class:`~lightning_iet.modules.DiffusionModule`.

    Args:
        path: the file.
        use_ema: take the averaged weights, if there are any.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else.
    """
    content = outline(path, argument="ckpt")
    module = load_any_module(path, content=content)
    if not isinstance(module, DiffusionModule):
        raise ValueError(
            f"Argument `ckpt` expected a checkpoint of a DiffusionModule, but got '{path}', "
            f"which is one of a {type(module).__name__}. Draw its images with `lightning-iet sample`, and give them to "
            "`lightning-iet audit`."
        )
    network = module.ema if use_ema and module.ema is not None else module.unet
    if module.selection is not None:  # adapters, or an average of a part: neither says all about the network
        network = averaged_network(module.unet, module.ema if use_ema else None)
    use_ema = use_ema and module.ema is not None
    return Generator(module, str(path), _hash(module, network), use_ema, *_prepared(content))


def _prepared(content: dict[str, Any]) -> tuple[Fit | None, ValueRange | None]:
    """Find out from the state of the data module how images were brought to one size and to 8 bits."""
    for state in content.values():
        if isinstance(state, dict) and state.get("fit") in get_args(Fit) and "image_size" in state:
            return cast(Fit, state["fit"]), parse_range(state["range"]) if "range" in state else None
    return None, None


def load_pipeline(folder: Path) -> Generator:
    """Load an unconditional ``DDPMPipeline`` or ``DDIMPipeline`` of diffusers from the disk; nothing is fetched.

    Args:
        folder: as ``save_pretrained`` writes it: ``model_index.json``, ``unet`` and ``scheduler``.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds something else.
    """
    wanted = "Argument `pipeline` expected a folder with an unconditional DDPMPipeline or DDIMPipeline of diffusers"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{wanted}, but got '{folder}', which has no model_index.json. Check the path.")
    try:
        scheduler = _scheduler(folder)
        which = which_weights(folder / "unet") if (folder / "unet").is_dir() else {}
        unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet", local_files_only=True, **which)
        _check_unconditional(unet)
    except Exception as error:  # damaged files make diffusers raise anything
        raise ValueError(f"{wanted}, but got '{folder}': {first_line(error)}") from error
    module = DiffusionModule(unet, scheduler=scheduler, ema_decay=0)
    return Generator(module, str(folder), _hash(module, unet), use_ema=False)


def _scheduler(folder: Path) -> Any:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    scheduler = index.get("scheduler", [None, None])[1]
    # Classes are picked from lists of ours: a file must not name code to run.
    if index.get("_class_name") not in PIPELINES:
        raise ValueError(f"{index.get('_class_name')} is none of {', '.join(PIPELINES)}.")
    return scheduler_class(scheduler).from_pretrained(folder, subfolder="scheduler", local_files_only=True)


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


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Which images are drawn, and how.

    Attributes:
        num_samples: number of images.
        seed: seed of the run of images; image i depends on it and on i alone.
        sampler: ``"ddim"``, ``"ddpm"`` or ``"own"``, the model's own scheduler.
        num_inference_steps: denoiser calls for each image.
        batch_size: images at once; what is drawn is kept after each of these.
    """

    num_samples: int
    seed: int = 0
    sampler: Sampler = "ddim"
    num_inference_steps: int = 50
    batch_size: int = 256

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        steps, size = self.num_inference_steps, self.batch_size
        check_at_least(1, num_samples=self.num_samples, num_inference_steps=steps, batch_size=size)
        check_at_least(0, seed=self.seed)


def draw(generator: Generator, drawing: Drawing, *, cache: BlockCache) -> ImageSet:
    """Draw images, or take from the cache what was drawn before by the same weights with the same settings.

    Args:
        generator: the model; its images are rounded to 8 bits.
        drawing: which images.
        cache: where finished blocks go.

    Returns:
        The images on every process, named by their number.
    """

    def sample(place: slice, progress: Progress) -> dict[str, Tensor]:
        images = generator.module.sample(
            place.stop - place.start,
            seed=drawing.seed,
            start=place.start,
            batch_size=drawing.batch_size,
            sampler=drawing.sampler,
            num_inference_steps=drawing.num_inference_steps,
            use_ema=generator.use_ema,
        )
        return {"pixels": images.mul(255).round().to(torch.uint8)}

    settings = (generator.sha256, diffusers.__version__, drawing.seed, drawing.sampler, drawing.num_inference_steps)
    step, num = drawing.batch_size, drawing.num_samples
    blocks = in_blocks(
        "Drawing images",
        [digest("drawn", *settings, start, min(start + step, num)) for start in range(0, num, step)],
        sample,
        cache=cache,
        total=num,
        block=step,
        is_slow=True,
    )
    return image_set(torch.cat([block["pixels"] for block in blocks]), location=f"drawn by {generator.location}")


# --- losses, at the same timesteps and with the same noise for every set ----------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Probing:
    """Which losses are measured.

    Attributes:
        images: at most so many images of each set, chosen at random; ``None`` = all.
        timesteps: draws of noise for each image, each at a timestep of its own.
        seed: seed of the noise, and of the choice.
        batch_size: images at once.
    """

    images: int | None = None
    timesteps: int = 20
    seed: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        check_at_least(2, optional=True, loss_images=self.images)
        check_at_least(1, loss_timesteps=self.timesteps)


def measure_losses(
    generator: Generator,
    images: ImageSet,
    probing: Probing,
    *,
    cache: BlockCache,
    argument: str,
    labels: Tensor | None = None,
) -> Tensor:
    """Measure the loss of images at several timesteps.

    Args:
        generator: the model.
        images: real images, of the model's size and channels.
        probing: which of them, and where.
        cache: where finished blocks go.
        argument: what the images are, for the bar.
        labels: class of each image, shape ``(N,)``, for a model of classes; ``None`` = none are given.

    Returns:
        Shape ``(n, J)``, float32, on every process.
    """
    places = choose_images(len(images), probing.images, seed=probing.seed)
    steps = spread_timesteps(probing.timesteps, generator.module.num_timesteps)
    settings = (generator.sha256, images.sha256, images.pixels.shape, probing.seed, steps.tolist())
    of_labels = () if labels is None else (labels.tolist(),)
    blocks = in_blocks(
        f"Losses of {argument} images",
        [digest("losses", *settings, *of_labels, part.tolist()) for part in places.split(probing.batch_size)],
        lambda place, progress: {
            "losses": losses_at(
                generator.module,
                images.pixels[places[place]],
                places[place],
                steps,
                seed=probing.seed,
                use_ema=generator.use_ema,
                condition=None if labels is None else labels[places[place]],
                progress=progress,
            )
        },
        cache=cache,
        total=len(places),
        block=probing.batch_size,
    )
    return torch.cat([block["losses"] for block in blocks])
