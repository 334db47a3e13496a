"""Drawing images from captions, and handing the model on as a pipeline of diffusers."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from lightning_iet.functional.diffusion import guide
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.modules.base import TrainedAverage
from lightning_iet.modules.latent_diffusion.checkpoints import fuse_lora
from lightning_iet.modules.latent_diffusion.encoders import CaptionEncoder, Conditions, LatentEncoder
from lightning_iet.modules.sampling import Sampler, check_sampling, in_batches, make_sampler


def draw_latents(
    denoise: Callable[[Tensor, Tensor, Conditions], Tensor],
    scheduler: SchedulerMixin,
    shape: tuple[int, int, int],
    numbers: Sequence[int],
    *,
    conditions: Conditions,
    null: Conditions,
    guidance_scale: float,
    seed: int,
) -> Tensor:
    r"""Draw the latents of some images; each has a generator of its own, seeded from (seed, number of the image).

    With a guidance scale :math:`s > 1` the denoiser predicts twice, with the captions and without; see
    :func:`~lightning_iet.functional.diffusion.guide`.

    Args:
        denoise: ``denoise(latents (B, c, h, w), timestep (), conditions) -> prediction``.
        scheduler: A sampler of diffusers that has been told the number of steps.
        shape: ``(c, h, w)`` of one image's latents.
        numbers: Numbers of the images.
        conditions: Of each of them.
        null: What stands for no caption, one row.
        guidance_scale: :math:`s`; 1 = no guidance.
        seed: Seed of the run of images.

    Returns:
        Latents, shape ``(len(numbers), c, h, w)``.
    """
    generators = [torch.Generator().manual_seed(derive_seed(seed, number)) for number in numbers]
    # Noise is drawn on the CPU, so that a seed means the same images on every device.
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    latents = noise.to(conditions.hidden) * scheduler.init_noise_sigma
    is_guided = guidance_scale > 1
    if is_guided:
        conditions = conditions.behind(null)
    for timestep in scheduler.timesteps:
        noisy = torch.cat([latents] * 2) if is_guided else latents
        prediction = denoise(noisy, timestep.to(latents.device), conditions)
        if is_guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = guide(conditional, unconditional, scale=guidance_scale)
        latents = scheduler.step(prediction, timestep, latents, generator=generators).prev_sample
    return latents


class DrawsFromText:
    """What a :class:`~lightning_iet.modules.TextToImageModule` does beside training: it is mixed into that class."""

    unet: Any
    latents: LatentEncoder
    captions: CaptionEncoder
    ema: TrainedAverage | None
    scheduler: Any
    image_shape: tuple[int, int, int]
    guidance_scale: float
    sample_prompts: Sequence[str] | Literal["train"] | None
    _pipeline: Any

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps of training."""
        return int(self.scheduler.config.num_train_timesteps)

    @torch.no_grad()
    def sample(
        self,
        num: int,
        *,
        seed: int = 0,
        start: int = 0,
        batch_size: int = 16,
        sampler: Sampler = "ddim",
        num_inference_steps: int = 50,
        use_ema: bool = True,
        progress: Callable[[int], object] | None = None,
        prompts: Sequence[str] | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Draw images. Image i depends on ``(seed, start + i)`` and its prompt, not on batches or processes.

        Args:
            num: Number of images.
            seed: Seed of the run of images.
            start: Number of the first image.
            batch_size: Images at once.
            sampler: ``"ddim"`` (deterministic given the first noise) or ``"ddpm"`` (ancestral).
            num_inference_steps: Denoiser calls per image, at most T.
            use_ema: Whether the averaged weights are used (if any are kept).
            progress: Called with the number of images finished, after each batch.
            prompts: Captions; image number i has ``prompts[i % len(prompts)]``. Default: ``sample_prompts``.
            guidance_scale: 1 = no guidance. Default: the module's.

        Returns:
            Images in [0, 1] on the CPU, shape ``(num, 3, H, W)``.

        Raises:
            ValueError: For a number of images or steps out of range, or if the training captions are wanted and there
                is no training.
        """
        check_sampling(num, batch_size, num_inference_steps, most=self.num_timesteps)
        module: Any = self  # a LightningModule, where this is mixed in
        chosen = self._prompts(prompts)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        scheduler = make_sampler(sampler, self.scheduler)
        scheduler.set_timesteps(num_inference_steps)

        def draw(numbers: range) -> Tensor:
            latents = draw_latents(
                lambda noisy, timestep, told: module(noisy, timestep, told, use_ema=use_ema),
                scheduler,
                self._latent_shape(),
                numbers,
                conditions=self.captions([chosen(number) for number in numbers]),
                null=self.captions.null(),
                guidance_scale=scale,
                seed=seed,
            )
            return self.latents.decode(latents).float().cpu()

        return in_batches(draw, num, module=module, start=start, batch_size=batch_size, progress=progress)

    def pipeline(self, *, use_ema: bool = True, sampler: Sampler = "ddim") -> Any:
        """The model as a pipeline of diffusers of the class that it came from, for whoever does not have this package.

        Adapters are worked into the weights *(our choice: it loads without peft)*. With the same seeds it draws the
        images of :meth:`sample`, to rounding: image i with ``torch.Generator().manual_seed(derive_seed(seed, i))``.

        Args:
            use_ema: Whether it gets the averaged weights (if any are kept).
            sampler: Its scheduler: ``"ddim"`` or ``"ddpm"``.

        Returns:
            A pipeline with weights of its own, on the CPU in float32; ``save_pretrained`` writes it.
        """
        parts = copy.deepcopy(self._pipeline.components)
        for part in parts.values():
            if isinstance(part, nn.Module):
                part.cpu().float().eval().requires_grad_(False)
        unet = parts["unet"]
        if use_ema and self.ema is not None:
            unet.load_state_dict(self.ema.weights(), strict=False)
        if getattr(unet, "peft_config", None):
            fuse_lora(unet)
        height, width = self._latent_shape()[1:]
        unet.register_to_config(sample_size=height if height == width else (height, width))
        parts["scheduler"] = make_sampler(sampler, self.scheduler)
        # Options of the class that are no parts.
        kind = type(self._pipeline)
        options = {
            name: self._pipeline.config[name]
            for name in ("requires_safety_checker", "force_zeros_for_empty_prompt")
            if name in self._pipeline.config
        }
        pipeline = kind(**parts, **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _latent_shape(self) -> tuple[int, int, int]:
        scale = self.latents.scale
        return self.unet.config.in_channels, self.image_shape[1] // scale, self.image_shape[2] // scale

    def _prompts(self, prompts: Sequence[str] | None) -> Callable[[int], str]:
        """The caption of each image, by its number."""
        if prompts is None and self.sample_prompts == "train":
            samples = getattr(getattr(getattr(self, "_trainer", None), "datamodule", None), "train_set", None)
            if samples is None:
                raise ValueError(
                    "Argument `prompts` expected captions, but got none, and `sample_prompts` is 'train', whose images "
                    "are at hand while training only. Give captions."
                )
            return lambda number: str(samples[number % len(samples)][1])
        texts = [""] if prompts is None and self.sample_prompts is None else list(prompts or self.sample_prompts or ())
        if not texts:
            raise ValueError("Argument `prompts` expected at least one caption, but got none.")
        return lambda number: texts[number % len(texts)]


def check_size(image_size: int | tuple[int, int] | None, *, unet: Any, scale: int) -> tuple[int, int, int]:
    """Shape ``(3, H, W)`` of the images.

    Args:
        image_size: Height and width; ``None`` = what the denoiser is made for.
        unet: The denoiser, with ``config.sample_size`` in rows of latents.
        scale: Pixels for each row of latents.

    Raises:
        ValueError: If the autoencoder cannot halve the size often enough.
    """
    if image_size is None:
        own = unet.config.sample_size
        height, width = (own, own) if isinstance(own, int) else own
        return 3, height * scale, width * scale
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < scale or height % scale or width % scale:
        raise ValueError(
            f"Argument `image_size` expected multiples of {scale}, the pixels for each row of the autoencoder's "
            f"latents, but got {height} × {width}."
        )
    return 3, height, width
