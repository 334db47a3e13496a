"""Find out whether a diffusion model copies, and what its loss gives away of its training images."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning_iet.audit.core import check_sets
from lightning_iet.audit.findings import Findings
from lightning_iet.audit.generator import Drawing, Generator, draw, load_checkpoint, load_pipeline
from lightning_iet.audit.losses import Probing, measure_losses
from lightning_iet.audit.reading import ImageSet
from lightning_iet.evaluation.membership import Membership, infer_membership, spread_timesteps
from lightning_iet.modules.noise_processes import Sampler
from lightning_iet.tools.audit import AuditJob


def audit_model(
    train: Path,
    held_out: Path,
    *,
    ckpt: Path | None = None,
    pipeline: Path | None = None,
    num_samples: int = 10_000,
    seed: int = 0,
    sampler: Sampler = "ddim",
    num_inference_steps: int = 50,
    use_ema: bool = True,
    batch_size: int = 256,
    loss_images: int | None = 10_000,
    loss_timesteps: int = 20,
    **options: Any,
) -> Findings:
    """Find out whether a diffusion model copies its training images.

    Draws images and audits them as `audit` does; measures besides whether the model's loss tells training images from
    held-out ones (membership inference), and how far the two losses are apart at each timestep.

    The model is a checkpoint of a DiffusionModule, or a folder with an unconditional DDPMPipeline or DDIMPipeline of
    diffusers. An audit that is interrupted goes on when the same command is given again; several processes of torchrun
    share the work and find the same figures.

    Args:
        train: The images that the model was trained on, in any form that `audit` takes.
        held_out: Real images from the same source that it was not trained on.
        ckpt: A checkpoint of a DiffusionModule.
        pipeline: A folder of diffusers; nothing is fetched from a network.
        num_samples: Number of images to draw. Image i depends on the model, the seed and i alone.
        seed: Seed of the images, and of the noise that losses are measured with.
        sampler: "ddim" (50 steps suffice), "ddpm" (ancestral, with as many steps as in training for best quality), or
            "own", the model's scheduler. Flow matching and EDM have the last alone, for "ddim" too.
        num_inference_steps: Denoiser calls per image.
        use_ema: Whether the averaged weights are audited rather than the last ones.
        batch_size: Images at once; finished work is kept after each of these.
        loss_images: At most so many images of each set whose loss is measured, chosen at random; null = all.
        loss_timesteps: Timesteps at which the loss of each image is measured.
        options: Those of :class:`~lightning_iet.tools.audit.AuditJob`.

    Returns:
        The figures, as in metrics.json.

    Raises:
        FileNotFoundError: If there is no such model, or there are no such images.
        ValueError: If the model or the images cannot be used, or the report cannot be written.
    """
    job = AuditJob(**options)
    drawing = Drawing(
        num_samples=num_samples,
        seed=seed,
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
    )
    probing = Probing(images=loss_images, timesteps=loss_timesteps, seed=seed, batch_size=batch_size)
    generator = _load(ckpt, pipeline, use_ema=use_ema)
    _check_steps(drawing, generator)
    _check_resize(job, generator)
    generator.module.to(job.on)
    with job.images({"train": train, "held_out": held_out}) as sets:
        sets = {name: _fitting(images, generator, name) for name, images in sets.items()}
        check_sets(sets, job.k)
        membership = _membership(generator, sets, probing, job)
        sets["generated"] = draw(generator, drawing, cache=job.blocks)
        settings = {
            "model": generator.location,
            "model_sha256": generator.sha256,
            "averaged_weights": generator.use_ema,
        }
        losses = {"loss_images": loss_images, "loss_timesteps": loss_timesteps}
        return job.finish(sets, settings=settings | asdict(drawing) | losses, membership=membership)


def _load(ckpt: Path | None, pipeline: Path | None, *, use_ema: bool) -> Generator:
    if ckpt is not None and pipeline is None:
        return load_checkpoint(Path(ckpt), use_ema=use_ema)
    if pipeline is not None and ckpt is None:
        return load_pipeline(Path(pipeline))
    raise ValueError(
        "Arguments `ckpt` and `pipeline` expected one of them, a checkpoint or a folder of diffusers, but got "
        f"{'neither' if ckpt is None else 'both'}."
    )


def _check_steps(drawing: Drawing, generator: Generator) -> None:
    most = generator.module.num_timesteps
    if drawing.num_inference_steps > most:
        raise ValueError(
            f"Argument `num_inference_steps` expected at most {most}, the timesteps of the model, but got "
            f"{drawing.num_inference_steps}."
        )


def _check_resize(job: AuditJob, generator: Generator) -> None:
    if job.size not in (None, generator.module.image_shape[1:]):
        raise ValueError(
            f"Argument `resize` expected {_size(generator)}, the size of the model's images, but got '{job.resize}'."
        )


def _fitting(images: ImageSet, generator: Generator, argument: str) -> ImageSet:
    """Refuse images of another size; grey ones for a model of colours have their channel repeated."""
    channels, height, width = images.pixels.shape[1:]
    wanted = generator.module.image_shape
    if (height, width) != wanted[1:]:
        raise ValueError(
            f"Argument `{argument}` expected images of {_size(generator)} pixels, as the model draws, but got "
            f"{width}x{height}. Bring them to that size with --resize {_size(generator)}."
        )
    if channels > wanted[0]:
        raise ValueError(
            f"Argument `{argument}` expected grey images, as the model draws, but got images in colour. "
            "Give the images as the model was trained on them."
        )
    return replace(images, pixels=images.pixels.expand(-1, wanted[0], -1, -1).contiguous())


def _size(generator: Generator) -> str:
    _, height, width = generator.module.image_shape
    return f"{width}x{height}"


def _membership(generator: Generator, sets: dict[str, ImageSet], probing: Probing, job: AuditJob) -> Membership:
    losses = {
        name: measure_losses(generator, images, probing, cache=job.blocks, argument=name)
        for name, images in sets.items()
    }
    return infer_membership(**losses, timesteps=spread_timesteps(probing.timesteps, generator.module.num_timesteps))
