"""Drawing images from a module, and handing it on as a pipeline of diffusers."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMPipeline, SchedulerMixin
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_iet.functional.diffusion import guide
from lightning_iet.modules.conditioning import Conditioning, Labels
from lightning_iet.modules.denoisers import image_shape_of
from lightning_iet.modules.pipelines import make_pipeline
from lightning_iet.modules.sampling import Sampler, make_sampler, sample_images

__all__ = ["DrawsImages"]


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
