"""A diffusion model around any denoiser."""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_iet.data.samples import labels_of
from lightning_iet.functional.checks import check_number
from lightning_iet.functional.diffusion import FlowWeighting
from lightning_iet.modules.base import DenoisingModule, averaged_network
from lightning_iet.modules.conditioning import (
    Labels,
    check_denoiser,
    check_guidance,
    check_image_shape,
    disable_label_dropout,
    find_conditioning,
    image_shape_of,
)
from lightning_iet.modules.noise_processes import Sampler, sample_images
from lightning_iet.modules.pretrained import build, given_or_pretrained, make_pipeline, specify


class DiffusionModule(DenoisingModule):
    r"""Trains a denoiser :math:`f(x_t, t)` with the loss :math:`l = \mathrm{mean}_{CHW} (f(x_t, t) - \epsilon)^2`.

    Losses stay per sample until one reducer, ``self.loss_reducer(sample_loss, timesteps)``, by default the mean;
    :class:`~lightning_iet.callbacks.AntiGradientControl` puts its own in that place.

    A denoiser may take a condition as well, :math:`f(x_t, t, c)`: the second entry of a batch. A U-Net of diffusers
    takes class labels if it has ``num_class_embeds``, a DiT always does; your own one takes labels if ``num_classes``
    says so, and otherwise conditions of any kind, if it has a third argument without default.

    Args:
        unet: Any denoiser called as ``unet(noisy_images, timesteps)`` (and ``class_labels=`` or a third argument) that
            returns a tensor of the images' shape, or an object with it as ``.sample``, such as
            ``diffusers.UNet2DModel``. To sample images, it needs a ``config`` with ``in_channels`` and ``sample_size``.
        pretrained: Instead of ``unet``: where to take a published one from, with its scheduler; a folder of a diffusers
            pipeline or U-Net, or its id on the Hugging Face hub.
        scheduler: Noise schedule, a scheduler of diffusers with betas, for flow matching
            (``FlowMatchEulerDiscreteScheduler``) or EDM (``EDMEulerScheduler``); what it sets for training is taken
            from its ``config``, any other is refused. Default: that of the pretrained model (which must be given if
            that comes without), or for a new denoiser ``DDPMScheduler()``: linear betas 1e-4 … 0.02, T = 1000,
            epsilon-prediction (DDPM).
        flow_weighting: Of flow matching, how noise levels are drawn or their losses weighted: ``"logit_normal"`` (the
            default), ``"mode"``, ``"sigma_sqrt"``, ``"cosmap"`` or ``"none"``, see
            :func:`~lightning_iet.functional.diffusion.draw_flow_levels`.
        ema_decay: Decay of the exponential moving average of the weights, in [0, 1); 0 = no average is kept.
        optimizer: Makes the optimizer from the parameters. Default: Adam with learning rate 2e-4.
        warmup_steps: Optimizer steps (of each shard), n, over which the learning rate rises linearly; the first has
            1/n of it.
        num_classes: Number of classes, if the denoiser does not say.
        label_dropout: Share of the labels in training that are replaced by a null label, in [0, 1], so that images can
            be sampled with guidance; 0.1 is usual. The null label is ``num_classes``: ``num_class_embeds`` is one more.
        guidance_scale: Of the images that are sampled, see :func:`~lightning_iet.functional.diffusion.guide`; 1 = none.
        channels_last: Keep weights and images in that order in memory, in which convolutions are faster.
        compile: Compile the denoiser with ``torch.compile`` when training starts. Checkpoints are the same.

    Raises:
        ValueError: For values out of range, or a denoiser that does not fit them or itself.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
        ...                    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False)
        >>> module = DiffusionModule(unet, ema_decay=0.99)
        >>> module.losses(torch.rand(5, 1, 8, 8), torch.arange(5), torch.randn(5, 1, 8, 8)).shape
        torch.Size([5])
        >>> module.sample(3, num_inference_steps=2).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        unet: nn.Module | None = None,
        *,
        pretrained: str | None = None,
        scheduler: SchedulerMixin | None = None,
        flow_weighting: FlowWeighting | None = None,
        ema_decay: float = 0.9999,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=2e-4),
        warmup_steps: int = 0,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        guidance_scale: float = 1.0,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(
            optimizer=optimizer, warmup_steps=warmup_steps, ema_decay=ema_decay, guidance_scale=guidance_scale
        )
        check_number("label_dropout", label_dropout, "[0, 1]", "0.1 is usual; 0 = labels are always given.")
        unet, known = given_or_pretrained(unet, pretrained, scheduler)
        check_denoiser(unet)
        self.conditioning = find_conditioning(unet, num_classes=num_classes, label_dropout=label_dropout)
        check_guidance(self.conditioning, guidance_scale)
        disable_label_dropout(unet)
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.unet = unet.to(memory_format=torch.channels_last) if channels_last else unet
        self.scheduler = DDPMScheduler() if known is None else known  # some have no truth value
        self.flow_weighting = flow_weighting
        _ = self.process  # which refuses a scheduler that it cannot train with
        self.label_dropout = label_dropout
        self.is_to_compile = compile
        self.average_weights()

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

    # --- training --------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, timesteps: Tensor, condition: Any = None, *, use_ema: bool = False) -> Tensor:
        """Predict from noisy images.

        Args:
            images: Noisy images, shape ``(B, C, H, W)``.
            timesteps: 0 … T - 1, shape ``(B,)`` or ``()``.
            condition: What each image shows, if the denoiser takes conditions: labels, shape ``(B,)``, or anything
                else that it takes. ``None`` = the null label.
            use_ema: Whether the averaged weights predict (if any are kept).

        Returns:
            The prediction, shape ``(B, C, H, W)``.
        """
        denoiser = self.unet if self.ema is None or not use_ema else partial(self.ema.call, self.unet)
        images = images.to(memory_format=self.memory_format)
        if self.conditioning is None:
            output = denoiser(images, timesteps)
        else:
            output = self.conditioning.predict(denoiser, images, timesteps, condition)
        return output if isinstance(output, Tensor) else output.sample

    def losses(
        self, images: Tensor, timesteps: Tensor, noise: Tensor, condition: Any = None, *, use_ema: bool = False
    ) -> Tensor:
        """Return the loss of each sample.

        Args:
            images: Clean images in [0, 1], shape ``(B, C, H, W)``.
            timesteps: 0 … T - 1, shape ``(B,)``.
            noise: Gaussian noise, shape ``(B, C, H, W)``.
            condition: As for :meth:`forward`.
            use_ema: Whether the averaged weights predict.

        Returns:
            Shape ``(B,)``.
        """
        return super().losses(images * 2 - 1, timesteps, noise, condition, use_ema=use_ema)

    def training_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """Take one step; return ``loss`` with the losses and timesteps of its samples."""
        images, condition = self.inputs(batch, training=True)
        timesteps = self.process.draw(len(images), device=images.device)
        noise = torch.randn_like(images)
        if self.conditioning is not None and self.label_dropout:
            condition = self.conditioning.drop(condition, self.label_dropout)
        return self.reduced(self.losses(images, timesteps, noise, condition), timesteps)

    def inputs(self, batch: Any, *, training: bool) -> tuple[Tensor, Any]:
        """Return images and conditions of a batch.

        Raises:
            ValueError: If they do not fit the denoiser, which would fail with a message about some layer.
        """
        images, *rest = batch
        condition = rest[0] if rest and self.conditioning is not None else None
        check_image_shape(self.unet, images.shape[1:])
        # Checking labels on an accelerator would wait for it; those of the data set have been checked.
        if self.conditioning is not None and not (isinstance(condition, Tensor) and condition.device.type != "cpu"):
            self.conditioning.check(condition)
        return images, condition

    def on_fit_start(self) -> None:
        """Check the labels of the data, list the tensors to average, and compile."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        for name in ("train_set", "control_set"):
            labels = labels_of(getattr(datamodule, name, None))  # type: ignore[arg-type]
            if self.conditioning is not None and labels is not None:
                self.conditioning.check(labels)
                if name == "train_set":
                    self.conditioning.warn_of_classes_without_images(labels)
        super().on_fit_start()
        if self.is_to_compile:
            self.unet.compile()  # in place: names in checkpoints stay as they are

    # --- sampling --------------------------------------------------------------------------------------------------

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
        """Sample images. Image i depends on ``(seed, start + i)``, not on batches or processes (to rounding).

        Args:
            num: Number of images.
            seed: Seed of the run of images.
            start: Number of the first image.
            batch_size: Images at once.
            sampler: ``"ddim"`` (deterministic given the first noise), ``"ddpm"`` (ancestral), or ``"own"``, see
                :meth:`~lightning_iet.modules.noise_processes.NoiseProcess.sampler`.
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
        conditioning = self.conditioning
        check_guidance(conditioning, scale)
        if conditioning is None:
            if labels is not None:
                raise ValueError(
                    f"Argument `labels` expected none for a denoiser without conditions, but got {labels}."
                )
            conditions = {}
        else:
            told = conditioning.labels_of_images(start, num, labels).to(self.device)
            conditions = {
                "conditions": lambda numbers: told[numbers.start - start : numbers.stop - start],
                "add_null": conditioning.add_null,
            }
        return sample_images(
            partial(self, use_ema=use_ema),
            self.process.sampler(sampler),
            self.image_shape,
            num,
            module=self,
            guidance_scale=scale,
            seed=seed,
            start=start,
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            progress=progress,
            **conditions,
        )

    def pipeline(self, *, use_ema: bool = True, sampler: Sampler | None = None) -> "diffusers.DiffusionPipeline":
        """Return the model as a pipeline of diffusers, for whoever does not have this package.

        With the same seeds it samples the images of :meth:`sample`, to rounding: image i with the generator
        ``torch.Generator().manual_seed(derive_seed(seed, i))``. The pipeline of a class-conditional model can be saved
        and loaded, but diffusers' own call of it gives no labels: call its ``unet`` with ``class_labels=``.

        Its class is ``DDPMPipeline``; where the scheduler scales what the denoiser sees (EDM, Euler), which that class
        leaves out, ``ConsistencyModelPipeline``, whose loop is the same one with that scaling.

        Args:
            use_ema: Whether it gets the averaged weights (if any are kept).
            sampler: Its scheduler: ``"ddpm"``, ``"ddim"`` or ``"own"``. Default: ``"own"`` for flow matching and EDM,
                otherwise ``"ddpm"``.

        Returns:
            A pipeline with weights of its own, on the CPU.

        Raises:
            TypeError: If the denoiser is none of diffusers'.
            ValueError: If the model cannot be sampled in that way.
        """
        denoiser = averaged_network(self.unet, self.ema if use_ema else None)
        return make_pipeline(denoiser, self.process.sampler(sampler or self.process.default_sampler))

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def specification(self) -> dict[str, Any]:
        """Return what builds the module again; ``unet`` or ``scheduler`` is None where diffusers lacks its class."""
        return {
            "module": "DiffusionModule",
            "unet": specify(self.unet),
            "scheduler": specify(self.scheduler),
            "flow_weighting": self.flow_weighting,
            "ema_decay": self.ema_decay,
            "warmup_steps": self.warmup_steps,
            "num_classes": None if self.conditioning is None else self.conditioning.num_classes,
            "label_dropout": self.label_dropout,
            "guidance_scale": self.guidance_scale,
        }

    @classmethod
    def constructor_arguments(cls, specification: dict[str, Any], path: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that build the module; ``unet=`` and ``scheduler=`` give what diffusers does not have.

        Raises:
            ValueError: If they are not given.
        """
        arguments = {name: value for name, value in specification.items() if name not in given and value is not None}
        arguments.pop("module", None)
        for name in ("unet", "scheduler"):
            if name in arguments:
                arguments[name] = build(arguments[name])
        if "unet" not in arguments | given:
            raise ValueError(
                f"Argument `unet` expected the denoiser of {path}, which does not say how to build it, but got none. "
                "Use load_from_checkpoint(path, unet=YourDenoiser(…))."
            )
        if specification.get("scheduler", {}) is None and "scheduler" not in given:
            raise ValueError(
                f"Argument `scheduler` expected the noise schedule of {path}, which is none of diffusers' own, but got "
                "none. Use load_from_checkpoint(path, scheduler=YourScheduler(…))."
            )
        return arguments | given
