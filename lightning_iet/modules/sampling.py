"""Drawing images from a module, and handing it on as a pipeline of diffusers."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, SchedulerMixin
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_iet.functional.diffusion import guide
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.modules.conditioning import Conditioning, Labels, image_shape_of
from lightning_iet.modules.pretrained import make_pipeline

Sampler = Literal["ddim", "ddpm"]


@torch.no_grad()
def sample_images(
    denoise: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    scheduler: SchedulerMixin,
    image_shape: tuple[int, int, int],
    num: int,
    *,
    module: nn.Module,
    labels: Tensor | None = None,
    seed: int = 0,
    start: int = 0,
    batch_size: int = 256,
    num_inference_steps: int = 50,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Draw images; each has a generator of its own, seeded from (seed, number of the image).

    Args:
        denoise: ``denoise(noisy (B, C, H, W), timesteps (B,), labels (B,) or None) -> prediction``.
        scheduler: A sampler of diffusers, not yet told the number of steps.
        image_shape: ``(C, H, W)``.
        num: Number of images.
        module: Put into eval mode while drawing; says the device and dtype.
        labels: What each image shows, shape ``(num, ...)``; ``None`` = no conditions.
        seed: Seed of the run of images.
        start: Number of the first image.
        batch_size: Images at once.
        num_inference_steps: Denoiser calls per image.
        progress: Called with the number of images of each finished batch.

    Returns:
        Images in [0, 1] on the CPU, shape ``(num, C, H, W)``.

    Raises:
        ValueError: For numbers out of range.
    """
    check_sampling(num, batch_size, num_inference_steps, most=scheduler.config.num_train_timesteps)
    scheduler.set_timesteps(num_inference_steps)
    weight = next(module.parameters())

    def draw(numbers: range) -> Tensor:
        generators = [torch.Generator().manual_seed(derive_seed(seed, number)) for number in numbers]
        told = None if labels is None else labels[numbers.start - start : numbers.stop - start].to(weight.device)
        return _sample_batch(denoise, scheduler, image_shape, generators, weight, labels=told)

    return in_batches(draw, num, module=module, start=start, batch_size=batch_size, progress=progress)


def make_sampler(sampler: Sampler, trained: SchedulerMixin) -> SchedulerMixin:
    """The scheduler that draws, with the noise schedule of training.

    Args:
        sampler: ``"ddim"`` (deterministic given the first noise) or ``"ddpm"`` (ancestral).
        trained: The scheduler of training.

    Example:
        >>> type(make_sampler("ddim", DDPMScheduler())).__name__
        'DDIMScheduler'
    """
    kind = DDIMScheduler if sampler == "ddim" else DDPMScheduler
    return kind.from_config(trained.config)


def check_sampling(num: int, batch_size: int, num_inference_steps: int, *, most: int) -> None:
    """Refuse numbers out of range.

    Args:
        num: Number of images.
        batch_size: Images at once.
        num_inference_steps: Denoiser calls per image.
        most: Timesteps of training.

    Raises:
        ValueError: Naming the argument.
    """
    for name, value in (("num", num), ("batch_size", batch_size), ("num_inference_steps", num_inference_steps)):
        if value < 1:
            raise ValueError(f"Argument `{name}` expected an integer ≥ 1, but got {value}.")
    if num_inference_steps > most:
        raise ValueError(f"Argument `num_inference_steps` expected at most {most}, but got {num_inference_steps}.")


def in_batches(
    draw: Callable[[range], Tensor],
    num: int,
    *,
    module: nn.Module,
    start: int = 0,
    batch_size: int,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Draw images batch by batch.

    Args:
        draw: Draws the images of these numbers, shape ``(len(numbers), C, H, W)``.
        num: Number of images.
        module: Put into eval mode while drawing.
        start: Number of the first image.
        batch_size: Images at once.
        progress: Called with the number of images of each finished batch.

    Returns:
        Shape ``(num, C, H, W)``.

    Example:
        >>> in_batches(lambda numbers: torch.tensor(numbers), 5, module=nn.Identity(), start=2, batch_size=2)
        tensor([2, 3, 4, 5, 6])
    """
    was_training = module.training
    module.eval()
    try:
        batches = []
        for first in range(start, start + num, batch_size):
            numbers = range(first, min(first + batch_size, start + num))
            batches.append(draw(numbers))
            if progress is not None:
                progress(len(numbers))
        return torch.cat(batches)
    finally:
        module.train(was_training)


def _sample_batch(
    denoise: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    scheduler: SchedulerMixin,
    image_shape: tuple[int, int, int],
    generators: list[torch.Generator],
    like: Tensor,
    *,
    labels: Tensor | None,
) -> Tensor:
    # Noise is drawn on the CPU, so that a seed means the same images on every device.
    images = torch.stack([torch.randn(image_shape, generator=generator) for generator in generators]).to(like)
    for timestep in scheduler.timesteps:
        prediction = denoise(images, timestep.to(images.device).expand(len(images)), labels)
        images = scheduler.step(prediction, timestep, images, generator=generators).prev_sample
    return (images / 2 + 0.5).clamp(0, 1).float().cpu()


class DrawsImages:
    """What a :class:`~lightning_iet.modules.DiffusionModule` does beside training: it is mixed into that class."""

    unet: nn.Module
    ema: AveragedModel | None
    scheduler: SchedulerMixin
    conditioning: Conditioning | None
    guidance_scale: float

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps of training."""
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the images, from the denoiser's ``config``."""
        shape = image_shape_of(self.unet)
        if shape is None:
            raise ValueError(
                "Argument `unet` expected a denoiser with config.in_channels and config.sample_size to sample from, "
                f"but got {type(self.unet).__name__}. Give it such a config."
            )
        return shape

    def sample(
        self,
        num: int,
        *,
        seed: int = 0,
        start: int = 0,
        batch_size: int = 256,
        sampler: Sampler = "ddim",
        num_inference_steps: int = 50,
        use_ema: bool = True,
        labels: Labels | None = None,
        guidance_scale: float | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Draw images. Image i depends on ``(seed, start + i)``, not on batches or processes (to rounding).

        Args:
            num: Number of images.
            seed: Seed of the run of images.
            start: Number of the first image.
            batch_size: Images at once.
            sampler: ``"ddim"`` (deterministic given the first noise) or ``"ddpm"`` (ancestral).
            num_inference_steps: Denoiser calls per image, at most T.
            use_ema: Whether the averaged weights are used (if any are kept).
            labels: What the images show, if the denoiser takes conditions: one label for all, or one for each image.
                By default image i shows class i mod ``num_classes``, so that all classes get equal shares.
            guidance_scale: See :func:`~lightning_iet.functional.diffusion.guide`; ``None`` = the module's.
            progress: Called with the number of images finished, after each batch.

        Returns:
            Images in [0, 1] on the CPU, shape ``(num, C, H, W)``.

        Raises:
            ValueError: For a number of images or steps out of range, or labels or guidance that the denoiser does not
                take.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        check_guidance(self.conditioning, scale)
        if self.conditioning is None and labels is not None:
            raise ValueError(f"Argument `labels` expected none for a denoiser without conditions, but got {labels}.")
        return sample_images(
            lambda images, timesteps, told: self._guided(images, timesteps, told, scale=scale, use_ema=use_ema),
            make_sampler(sampler, self.scheduler),
            self.image_shape,
            num,
            module=self,  # type: ignore[arg-type]  # a LightningModule, where this is mixed in
            labels=None if self.conditioning is None else self.conditioning.labels_of_images(start, num, labels),
            seed=seed,
            start=start,
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            progress=progress,
        )

    def _guided(
        self, images: Tensor, timesteps: Tensor, labels: Tensor | None, *, scale: float, use_ema: bool
    ) -> Tensor:
        predict: Any = self  # a LightningModule, where this is mixed in
        if scale == 1 or self.conditioning is None or labels is None:
            return predict(images, timesteps, labels, use_ema=use_ema)
        both = torch.cat([labels, self.conditioning.null_labels(images)])
        conditional, unconditional = predict(
            torch.cat([images, images]), timesteps.expand(len(images)).repeat(2), both, use_ema=use_ema
        ).chunk(2)
        return guide(conditional, unconditional, scale=scale)

    def pipeline(self, *, use_ema: bool = True, sampler: Sampler = "ddpm") -> DDPMPipeline:
        """The model as a pipeline of diffusers, for whoever does not have this package.

        With the same seeds it draws the images of :meth:`sample`, to rounding: image i with the generator
        ``torch.Generator().manual_seed(derive_seed(seed, i))``. The pipeline of a class-conditional model can be saved
        and loaded, but diffusers' own call of it gives no labels: call its ``unet`` with ``class_labels=``.

        Args:
            use_ema: Whether it gets the averaged weights (if any are kept).
            sampler: Its scheduler: ``"ddpm"`` or ``"ddim"``.

        Returns:
            A pipeline with weights of its own, on the CPU.

        Raises:
            TypeError: If the denoiser is none of diffusers'.
        """
        ema = self.ema if use_ema else None
        denoiser = self.unet if ema is None else ema.module
        return make_pipeline(denoiser, make_sampler(sampler, self.scheduler))


def check_guidance(conditioning: Conditioning | None, scale: float) -> None:
    """Refuse guidance where the denoiser does not know a null label.

    Raises:
        ValueError: For a scale other than 1.
    """
    if scale != 1 and (conditioning is None or conditioning.null is None):
        raise ValueError(
            f"Argument `guidance_scale` expected 1 for a denoiser without a null label, but got {scale}. "
            "Train with `label_dropout` > 0 and one more label embedding than classes."
        )
