"""A diffusion model around any denoiser."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_iet.functional.diffusion import mean_loss, prediction_target, sample_losses
from lightning_iet.modules.sampling import Sampler, sample_images
from lightning_iet.modules.specification import rebuild_arguments, specify

__all__ = ["DiffusionModule"]


class DiffusionModule(pl.LightningModule):
    r"""Trains a denoiser :math:`f(x_t, t)` with the loss :math:`l = \mathrm{mean}_{CHW} (f(x_t, t) - \epsilon)^2`.

    Losses stay per sample until one reducer, ``self.loss_reducer(sample_loss, timesteps)``, by default the mean;
    :class:`~lightning_iet.callbacks.AntiGradientControl` puts its own in that place.

    Args:
        unet: Any denoiser called as ``unet(noisy_images, timesteps)`` that returns a tensor of the images' shape, or an
            object with it as ``.sample``, such as ``diffusers.UNet2DModel``.
        scheduler: Noise schedule; prediction type and betas are taken from its ``config``. Default: ``DDPMScheduler()``
            with linear betas 1e-4 … 0.02, T = 1000 and epsilon-prediction, as in IET-AGC and DDPM.
        ema_decay: Decay of the exponential moving average of the weights, in [0, 1); 0 = no average is kept.
        optimizer: Makes the optimizer from the parameters. Default: Adam with learning rate 2e-4.
        warmup_steps: Optimizer steps (of each shard), n, over which the learning rate rises linearly; the first has
            1/n of it.

    Raises:
        ValueError: For values out of range.

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
        unet: nn.Module,
        *,
        scheduler: SchedulerMixin | None = None,
        ema_decay: float = 0.9999,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=2e-4),
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= ema_decay < 1:
            raise ValueError(f"Argument `ema_decay` expected a number in [0, 1), but got {ema_decay}.")
        if warmup_steps < 0:
            raise ValueError(f"Argument `warmup_steps` expected an integer ≥ 0, but got {warmup_steps}.")
        self.unet = unet
        self.scheduler = DDPMScheduler() if scheduler is None else scheduler
        self.ema = _moving_average(unet, ema_decay) if ema_decay else None
        self.ema_decay = ema_decay
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.loss_reducer: Callable[[Tensor, Tensor], Tensor] = mean_loss

    # --- training --------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, timesteps: Tensor, *, use_ema: bool = False) -> Tensor:
        """Predict from noisy images.

        Args:
            images: Noisy images, shape ``(B, C, H, W)``.
            timesteps: 0 … T - 1, shape ``(B,)`` or ``()``.
            use_ema: Whether the averaged weights predict (if any are kept).

        Returns:
            The prediction, shape ``(B, C, H, W)``.
        """
        denoiser = self.ema if use_ema and self.ema is not None else self.unet
        output = denoiser(images, timesteps)
        return output if isinstance(output, Tensor) else output.sample

    def losses(self, images: Tensor, timesteps: Tensor, noise: Tensor, *, use_ema: bool = False) -> Tensor:
        """Loss of each sample.

        Args:
            images: Clean images in [0, 1], shape ``(B, C, H, W)``.
            timesteps: 0 … T - 1, shape ``(B,)``.
            noise: Gaussian noise, shape ``(B, C, H, W)``.
            use_ema: Whether the averaged weights predict.

        Returns:
            Shape ``(B,)``.
        """
        images = images * 2 - 1
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        target = prediction_target(
            images, noise, timesteps, self.scheduler.alphas_cumprod, self.scheduler.config.prediction_type
        )
        return sample_losses(self(noisy, timesteps, use_ema=use_ema), target)

    def training_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """One step; returns ``loss`` with the losses and timesteps of its samples."""
        images = batch[0]
        timesteps = torch.randint(self.num_timesteps, (len(images),), device=images.device)
        losses = self.losses(images, timesteps, torch.randn_like(images))
        loss = self.loss_reducer(losses, timesteps)
        average = losses.detach().mean()
        self.log("train/loss", average, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))
        return {"loss": loss, "sample_loss": losses, "timesteps": timesteps}

    def validation_step(self, batch: Any, batch_idx: int = 0) -> None:
        """Loss on held-out images, always with the same noise, so that epochs compare."""
        self._held_out_loss("val/loss", batch[0], batch_idx)

    def test_step(self, batch: Any, batch_idx: int = 0) -> None:
        """The same on the test images."""
        self._held_out_loss("test/loss", batch[0], batch_idx)

    def _held_out_loss(self, name: str, images: Tensor, batch_idx: int) -> None:
        generator = torch.Generator().manual_seed(batch_idx)
        timesteps = torch.randint(self.num_timesteps, (len(images),), generator=generator).to(images.device)
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
        loss = self.losses(images, timesteps, noise, use_ema=True).mean()
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
        """List the tensors of the moving average once: walking through a model takes as long as averaging it."""
        if self.ema is not None:
            self._averaged = _MovingAverage(self.ema, self.unet)

    def on_fit_end(self) -> None:
        """Let go of the lists."""
        self.__dict__.pop("_averaged", None)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then move the average: together, so that nothing sees one without the other."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None:
            self._averaged.update()

    # --- sampling --------------------------------------------------------------------------------------------------

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps of training."""
        return int(self.scheduler.config.num_train_timesteps)

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
            progress: Called with the number of images finished, after each batch.

        Returns:
            Images in [0, 1] on the CPU, shape ``(num, C, H, W)``.

        Raises:
            ValueError: For a number of images or steps out of range.
        """
        kind = DDIMScheduler if sampler == "ddim" else DDPMScheduler
        return sample_images(
            lambda images, timestep: self(images, timestep, use_ema=use_ema),
            kind.from_config(self.scheduler.config),
            self.image_shape,
            num,
            module=self,
            seed=seed,
            start=start,
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            progress=progress,
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the images, from the denoiser's ``config``."""
        config = getattr(self.unet, "config", None)
        if config is None or getattr(config, "sample_size", None) is None:
            raise ValueError(
                "Argument `unet` expected a denoiser with config.in_channels and config.sample_size to sample from, "
                f"but got {type(self.unet).__name__}. Give it such a config."
            )
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to build the module again."""
        checkpoint["specification"] = {
            "unet": specify(self.unet),
            "scheduler": specify(self.scheduler),
            "ema_decay": self.ema_decay,
            "warmup_steps": self.warmup_steps,
        }

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, **kwargs: Any) -> "DiffusionModule":  # type: ignore[override]
        """Load a module as its checkpoint specifies it; a denoiser without a diffusers config is given as ``unet=``."""
        arguments = rebuild_arguments(checkpoint_path, given=kwargs)
        return super().load_from_checkpoint(checkpoint_path, map_location, weights_only=True, **arguments)


def _moving_average(unet: nn.Module, decay: float) -> AveragedModel:
    ema = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return ema.requires_grad_(False)


class _MovingAverage:
    """``ema <- d · ema + (1 - d) · unet``, from the first step on.

    ``AveragedModel.update_parameters`` asks a tensor on the device whether this is the first update: a wait for the
    device in every step. The arithmetic is the same; a first update that copies is not needed, for the average starts
    as a copy.
    """

    def __init__(self, ema: AveragedModel, unet: nn.Module) -> None:
        self.count = ema.n_averaged
        self.average: Any = ema.multi_avg_fn
        self.parameters = list(ema.module.parameters()), list(unet.parameters())
        self.buffers = list(zip(ema.module.buffers(), unet.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one optimizer step; buffers are copied."""
        self.average(*self.parameters, self.count)
        for averaged, buffer in self.buffers:
            averaged.copy_(buffer)
        self.count += 1
