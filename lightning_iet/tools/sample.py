"""Draw images from a checkpoint."""

from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm.auto import tqdm

from lightning_iet.modules import DiffusionModule
from lightning_iet.modules.sampling import Sampler
from lightning_iet.tools.figures import image_grid, save_figure
from lightning_iet.tools.run_folder import check_writable, free_folder, write_atomically
from lightning_iet.utilities.checkpoints import check_whole

__all__ = ["load_module", "sample"]


def sample(
    ckpt: Path,
    *,
    num: int = 64,
    out: Path = Path("samples"),
    seed: int = 0,
    sampler: Sampler = "ddim",
    num_inference_steps: int = 50,
    use_ema: bool = True,
    batch_size: int = 256,
    device: str = "auto",
) -> Path:
    """Draw images from a checkpoint and write them as PNG files, with a grid of them all beside the folder.

    Image i depends on the checkpoint, the seed and i alone. A folder that already holds files is left as it is; the
    images then go to a new folder beside it, and the last line says which.

    Args:
        ckpt: A checkpoint of a DiffusionModule, such as runs/digits/iet_agc/version_0/checkpoints/last.ckpt.
        num: Number of images.
        out: Folder for the images.
        seed: Seed of the images.
        sampler: "ddim" (50 steps suffice) or "ddpm" (ancestral, with as many steps as in training for best quality).
        num_inference_steps: Denoiser calls per image.
        use_ema: Whether the averaged weights are used rather than the last ones.
        batch_size: Images at once.
        device: "cpu", "cuda", "cuda:1" …; "auto" = a GPU if there is one.

    Returns:
        The folder of the images.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the file is not a checkpoint of a DiffusionModule, or the folder cannot be written.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    module = load_module(Path(ckpt)).to(device)
    folder = free_folder(Path(out))
    check_writable(folder, argument="out", remedy="Give another folder with `--out`.")
    with tqdm(total=num, desc="Drawing", unit="image") as bar:
        images = module.sample(
            num,
            seed=seed,
            batch_size=batch_size,
            sampler=sampler,
            num_inference_steps=num_inference_steps,
            use_ema=use_ema,
            progress=bar.update,
        )
    grid = _write(images, folder)
    print(f"Written to {folder}: {num} images; all at a glance: {grid}")
    return folder


def load_module(path: Path) -> DiffusionModule:
    """Load a module, or say in one line why that file is none.

    Args:
        path: A checkpoint of a DiffusionModule.

    Returns:
        The module, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else.
    """
    check_whole(path, argument="ckpt")
    try:
        return DiffusionModule.load_from_checkpoint(path, map_location="cpu")
    except ValueError:
        raise
    except Exception as error:  # torch and pickle raise anything on a file of another kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"Argument `ckpt` expected a checkpoint of a DiffusionModule, but got '{path}': {reason}"
        ) from error


def _write(images: Tensor, folder: Path) -> Path:
    width = max(len(str(len(images) - 1)), 5)
    for number, image in enumerate(images):
        with write_atomically(folder / f"{number:0{width}d}.png") as unfinished:
            to_pil_image(image.mul(255).round().byte()).save(unfinished)
    grid = folder.with_name(f"{folder.name}.png")  # beside the images: who audits the folder must not count it as one
    save_figure(image_grid(images), grid)
    return grid
