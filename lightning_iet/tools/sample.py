"""Sample images from a checkpoint."""

import inspect
from pathlib import Path

from torchvision.transforms.functional import to_pil_image

from lightning_iet.functional.checks import check_at_least
from lightning_iet.modules.noise_processes import Sampler
from lightning_iet.modules.pretrained import load_any_module
from lightning_iet.plots import image_grid, save_figure
from lightning_iet.utilities.devices import usable_device
from lightning_iet.utilities.files import check_writable, checkpoint_of, free_folder, write_atomically
from lightning_iet.utilities.progress import progress_bar


def sample(
    ckpt: Path,
    *,
    num_samples: int = 64,
    out: Path = Path("samples"),
    seed: int = 0,
    sampler: Sampler = "ddim",
    num_inference_steps: int = 50,
    use_ema: bool = True,
    batch_size: int = 256,
    device: str = "auto",
    labels: int | list[int] | None = None,
    guidance_scale: float | None = None,
    prompts: list[str] | None = None,
    grid: Path | None = None,
) -> Path:
    """Sample images from a checkpoint, or from the newest of a run, and write them as PNG files.

    Image i depends on the checkpoint, the seed and i alone. A folder that already holds files is left as it is; the
    images then go to a new folder beside it, and the last line says which.

    Args:
        ckpt: The folder of a run, such as runs/digits/iet_agc, or a checkpoint; may stand without --ckpt.
        num_samples: Number of images.
        out: Folder for the images.
        seed: Seed of the images.
        sampler: "ddim" (50 steps suffice), "ddpm" (ancestral, with as many steps as in training for best quality), or
            "own", the model's scheduler. Flow matching and EDM have the last alone, for "ddim" too.
        num_inference_steps: Denoiser calls per image.
        use_ema: Whether the averaged weights are used rather than the last ones.
        batch_size: Images at once.
        device: "cpu", "cuda", "cuda:1" …; "auto" = a GPU if there is one.
        labels: Of a class-conditional model: the class of all images, or a list with that of each. Default: all classes
            in turn.
        guidance_scale: Of a conditional model: 1 = no guidance, more = images that show their label or prompt more
            clearly. Default: as the model was configured.
        prompts: Of a text-to-image model: what the images show; image i has prompt i modulo their number.
        grid: File for a picture of all images at a glance; by default there is none.

    Returns:
        The folder of the images.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If a number is out of range, the file is something else, the model does not take such an option, or
            the folder cannot be written.
    """
    check_at_least(1, num_samples=num_samples, batch_size=batch_size)
    device = usable_device(device)
    module = load_any_module(checkpoint_of(Path(ckpt))).to(device)
    options = _options(module, labels=labels, guidance_scale=guidance_scale, prompts=prompts)
    folder = free_folder(Path(out))
    check_writable(folder, argument="out", remedy="Give another folder with `--out`.")
    if grid is not None and Path(grid).absolute().is_relative_to(folder.absolute()):
        raise ValueError(f"Argument `grid` expected a file outside of '{folder}', whose images an audit counts.")
    with progress_bar("Sampling images", num_samples) as bar:
        images = module.sample(
            num_samples,
            seed=seed,
            batch_size=batch_size,
            sampler=sampler,
            num_inference_steps=num_inference_steps,
            use_ema=use_ema,
            progress=bar.advance,
            **options,
        )
    width = max(len(str(num_samples - 1)), 5)
    for number, image in enumerate(images):
        with write_atomically(folder / f"{number:0{width}d}.png") as unfinished:
            to_pil_image(image.mul(255).round().byte()).save(unfinished)
    if grid is not None:
        save_figure(image_grid(images), Path(grid))
    print(f"Written to {folder}: {num_samples} images{'' if grid is None else f'; all at a glance: {grid}'}")
    return folder


def _options(module: object, **given: object) -> dict[str, object]:
    """What was given beyond the common options, if the module takes it."""
    taken = inspect.signature(module.sample).parameters  # type: ignore[attr-defined]
    for name, value in given.items():
        if value is not None and name not in taken:
            raise ValueError(f"Argument `{name}` expected none for a {type(module).__name__}, but got {value!r}.")
    return {name: value for name, value in given.items() if value is not None}
