"""A diffusion model around any denoiser."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from lightning_iet.data.samples import labels_of
from lightning_iet.functional.diffusion import mean_loss, prediction_target, sample_losses
from lightning_iet.modules.base import ClipsFusedGradients, DrawsAfresh, MovingAverage, moving_average
from lightning_iet.modules.conditioning import (
    check_denoiser,
    check_image_shape,
    find_conditioning,
    leave_dropping_to_us,
)
from lightning_iet.modules.pretrained import check_same_architecture, either, rebuild_arguments, specify
from lightning_iet.modules.sampling import DrawsImages, check_guidance


class DiffusionModule(DrawsImages, DrawsAfresh, ClipsFusedGradients, pl.LightningModule):
    r"""Trains a denoiser :math:`f(x_t, t)` with the loss :math:`l = \mathrm{mean}_{CHW} (f(x_t, t) - \epsilon)^2`.

    Losses stay per sample until one reducer, ``self.loss_reducer(sample_loss, timesteps)``, by default the mean;
    :class:`~lightning_iet.callbacks.AntiGradientControl` puts its own in that place.

    A denoiser may take a condition as well, :math:`f(x_t, t, c)`: the second entry of a batch. A U-Net of diffusers
    takes class labels if it has ``num_class_embeds``, a DiT always does; your own one takes labels if ``num_classes``
    says so, and otherwise what it likes, if it has a third argument without default.

    Args:
        unet: Any denoiser called as ``unet(noisy_images, timesteps)`` (and ``class_labels=`` or a third argument) that
            returns a tensor of the images' shape, or an object with it as ``.sample``, such as
            ``diffusers.UNet2DModel``. To draw images, it needs a ``config`` with ``in_channels`` and ``sample_size``.
        pretrained: Instead of ``unet``: where to take a published one from, with its scheduler; a folder of a diffusers
            pipeline or U-Net, or its id on the Hugging Face hub.
        scheduler: Noise schedule; prediction type and betas are taken from its ``config``. Default: that of the
            pretrained model, or ``DDPMScheduler()``: linear betas 1e-4 … 0.02, T = 1000, epsilon-prediction (DDPM).
        ema_decay: Decay of the exponential moving average of the weights, in [0, 1); 0 = no average is kept.
        optimizer: Makes the optimizer from the parameters. Default: Adam with learning rate 2e-4.
        warmup_steps: Optimizer steps (of each shard), n, over which the learning rate rises linearly; the first has
            1/n of it.
        num_classes: Number of classes, if the denoiser does not say.
        label_dropout: Share of the labels in training that are replaced by a null label, in [0, 1], so that images can
            be drawn with guidance; 0.1 is usual. The null label is ``num_classes``: ``num_class_embeds`` is one more.
        guidance_scale: Of the images that are drawn, see :func:`~lightning_iet.functional.diffusion.guide`; 1 = none.
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
        ema_decay: float = 0.9999,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=2e-4),
        warmup_steps: int = 0,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        guidance_scale: float = 1.0,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= ema_decay < 1:
            raise ValueError(f"Argument `ema_decay` expected a number in [0, 1), but got {ema_decay}.")
        if warmup_steps < 0:
            raise ValueError(f"Argument `warmup_steps` expected an integer ≥ 0, but got {warmup_steps}.")
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"Argument `label_dropout` expected a number in [0, 1], but got {label_dropout}.")
        unet, published = either(unet, pretrained)
        check_denoiser(unet)
        self.conditioning = find_conditioning(unet, num_classes=num_classes, label_dropout=label_dropout)
        check_guidance(self.conditioning, guidance_scale)
        leave_dropping_to_us(unet)
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.unet = unet.to(memory_format=torch.channels_last) if channels_last else unet
        self.scheduler = scheduler or published or DDPMScheduler()
        self.ema = moving_average(unet, ema_decay) if ema_decay else None
        self.ema_decay = ema_decay
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.label_dropout = label_dropout
        self.guidance_scale = guidance_scale
        self.is_to_compile = compile
        self.loss_reducer: Callable[[Tensor, Tensor], Tensor] = mean_loss

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
        denoiser = self.ema if use_ema and self.ema is not None else self.unet
        images = images.to(memory_format=self.memory_format)
        if self.conditioning is None:
            output = denoiser(images, timesteps)
        else:
            output = self.conditioning.predict(denoiser, images, timesteps, condition)
        return output if isinstance(output, Tensor) else output.sample

    def losses(
        self, images: Tensor, timesteps: Tensor, noise: Tensor, condition: Any = None, *, use_ema: bool = False
    ) -> Tensor:
        """Loss of each sample.

        Args:
            images: Clean images in [0, 1], shape ``(B, C, H, W)``.
            timesteps: 0 … T - 1, shape ``(B,)``.
            noise: Gaussian noise, shape ``(B, C, H, W)``.
            condition: As for :meth:`forward`.
            use_ema: Whether the averaged weights predict.

        Returns:
            Shape ``(B,)``.
        """
        images = images * 2 - 1
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        target = prediction_target(
            images, noise, timesteps, self.scheduler.alphas_cumprod, self.scheduler.config.prediction_type
        )
        return sample_losses(self(noisy, timesteps, condition, use_ema=use_ema), target)

    def training_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """One step; returns ``loss`` with the losses and timesteps of its samples."""
        images, condition = self._inputs(batch)
        timesteps = torch.randint(self.num_timesteps, (len(images),), device=images.device)
        noise = torch.randn_like(images)
        if self.conditioning is not None and self.label_dropout:
            condition = self.conditioning.drop(condition, self.label_dropout)
        losses = self.losses(images, timesteps, noise, condition)
        loss = self.loss_reducer(losses, timesteps)
        average = losses.detach().mean()
        self.log("train/loss", average, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))
        return {"loss": loss, "sample_loss": losses, "timesteps": timesteps}

    def _inputs(self, batch: Any) -> tuple[Tensor, Any]:
        """Images and conditions of a batch, looked at before the denoiser fails on them with a riddle."""
        images, *rest = batch
        condition = rest[0] if rest and self.conditioning is not None else None
        check_image_shape(self.unet, images.shape[1:])
        # Labels on an accelerator cannot be looked at without a wait; those of the data set have been.
        if self.conditioning is not None and not (isinstance(condition, Tensor) and condition.device.type != "cpu"):
            self.conditioning.check(condition)
        return images, condition

    def validation_step(self, batch: Any, batch_idx: int = 0) -> None:
        """Loss on held-out images, always with the same noise, so that epochs compare."""
        self._held_out_loss("val/loss", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int = 0) -> None:
        """The same on test images."""
        self._held_out_loss("test/loss", batch, batch_idx)

    def _held_out_loss(self, name: str, batch: Any, batch_idx: int) -> None:
        images, condition = self._inputs(batch)
        generator = torch.Generator().manual_seed(batch_idx)
        timesteps = torch.randint(self.num_timesteps, (len(images),), generator=generator).to(images.device)
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
        loss = self.losses(images, timesteps, noise, condition, use_ema=True).mean()
        self.log(name, loss, prog_bar=True, batch_size=len(images), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Optimizer over the denoiser's trainable parameters, and the warm-up."""
        optimizer = self.optimizer([parameter for parameter in self.unet.parameters() if parameter.requires_grad])
        if not self.warmup_steps:
            return optimizer
        # LinearLR starts at a factor > 0: step 1 of n has 1/n of the rate.
        warmup = LinearLR(optimizer, start_factor=1 / self.warmup_steps, total_iters=self.warmup_steps - 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Look at the labels of the data, list the tensors of the moving average once, and compile."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        labels = labels_of(getattr(datamodule, "train_set", None))  # type: ignore[arg-type]
        if self.conditioning is not None and labels is not None:
            self.conditioning.check(labels)
            self.conditioning.warn_of_classes_without_images(labels)
        if self.ema is not None:
            self._averaged = MovingAverage(self.ema, self.unet)
        if self.is_to_compile:
            self.unet.compile()  # in place: names in checkpoints stay as they are

    def on_fit_end(self) -> None:
        """Let go of the lists."""
        self.__dict__.pop("_averaged", None)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then move the average: together, so that nothing sees one without the other."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None:
            self._averaged.update()

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to build the module again."""
        checkpoint["specification"] = {
            "module": "DiffusionModule",
            "unet": specify(self.unet),
            "scheduler": specify(self.scheduler),
            "ema_decay": self.ema_decay,
            "warmup_steps": self.warmup_steps,
            "num_classes": None if self.conditioning is None else self.conditioning.num_classes,
            "label_dropout": self.label_dropout,
            "guidance_scale": self.guidance_scale,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Refuse the weights of another architecture in one line."""
        if strict:
            check_same_architecture(state_dict, self.state_dict())
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, **kwargs: Any) -> "DiffusionModule":  # type: ignore[override]
        """Load a module as its checkpoint specifies it; a denoiser without a diffusers config is given as ``unet=``."""
        arguments = rebuild_arguments(checkpoint_path, given=kwargs)
        return super().load_from_checkpoint(checkpoint_path, map_location, weights_only=True, **arguments)
