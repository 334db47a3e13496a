"""Fine-tuning of text-to-image models."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from diffusers import DDPMScheduler
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from lightning_iet.functional.diffusion import mean_loss, prediction_target, sample_losses
from lightning_iet.modules.base import ClipsFusedGradients, DrawsAfresh, TrainedAverage
from lightning_iet.modules.latent_diffusion.checkpoints import (
    SavesTrainedWeights,
    add_lora,
    arguments_of,
    check_arguments,
)
from lightning_iet.modules.latent_diffusion.drawing import DrawsFromText, check_size
from lightning_iet.modules.latent_diffusion.encoders import CaptionEncoder, Conditions, LatentEncoder, check_captioned
from lightning_iet.modules.latent_diffusion.pipelines import open_pipeline


class TextToImageModule(SavesTrainedWeights, DrawsFromText, DrawsAfresh, ClipsFusedGradients, pl.LightningModule):
    r"""Fine-tunes the U-Net of a Stable-Diffusion-class pipeline, in full or by adapters (LoRA).

    With latents :math:`z` of an image, drawn by the pipeline's autoencoder, and its caption :math:`c`, the loss of a
    sample is :math:`l = \mathrm{mean}_{CHW} (f(z_t, t, c) - y)^2`, where y is the noise or the velocity, whatever the
    pipeline was trained for. Losses stay per sample until ``self.loss_reducer(sample_loss, timesteps)``, the place of
    :class:`~lightning_iet.callbacks.AntiGradientControl` (published with threshold 0.8 for this).

    Autoencoder and text encoders stay as they are, in evaluation mode. They, and with LoRA the U-Net's own weights,
    are in memory once, however many shards there are, and are not saved: a checkpoint holds what is trained, its
    average, and the name of the pipeline that it belongs to.

    Batches are ``(images (B, 3, H, W) in [0, 1], captions, …)``.

    Args:
        pretrained: A folder, or a hub id (downloaded unless cached), of a ``StableDiffusionPipeline`` (1.x, 2.x) or
            ``StableDiffusionXLPipeline``.
        synthetic: Put a tiny pipeline with random weights in its place, to try a run without the real one.
        image_size: Height and width of the images in pixels, multiples of the autoencoder's scale (8). Default: what
            the pipeline draws.
        lora_rank: Rank of adapters, which are then all that is trained; ``None`` = train the whole U-Net.
        lora_alpha: Their strength is ``lora_alpha / lora_rank``; ``None`` = 1.
        lora_targets: Ends of names of the layers that get adapters. Default: all attention layers.
        optimizer: Makes the optimizer. Default: AdamW with learning rate 2.5e-6, published for IET-AGC.
        warmup_steps: Optimizer steps (of each shard), n, over which the learning rate rises linearly from 1/n.
        ema_decay: Decay of the exponential moving average of what is trained, in [0, 1); 0 = none is kept.
        caption_dropout: Share of captions that training leaves out, so that guidance keeps working. *(our choice: 0.1,
            as Stable Diffusion itself was trained; the publication says nothing of it)*
        cache_latents: Keep what the autoencoder makes of training images: ``"none"``, ``"memory"``, or a folder. An
            image that is sometimes mirrored is kept twice; one that is never the same twice is refused.
        cache_text: The same for captions.
        gradient_checkpointing: Save memory at the cost of a second forward pass.
        sample_prompts: What :meth:`sample` draws by default, in turn: captions, or ``"train"`` for those of the
            training images, the usual test for memorization (Somepalli et al., https://arxiv.org/abs/2305.20086).
            Default: no caption.
        guidance_scale: Of :meth:`sample`; 1 = no guidance.

    Raises:
        FileNotFoundError: If there is no such pipeline.
        ValueError: If it is of another class or incomplete, or for values out of range.

    Example:
        >>> module = TextToImageModule(synthetic=True, image_size=32, lora_rank=2)
        >>> sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        1920
        >>> module.sample(2, prompts=["a dog", "a cat"], num_inference_steps=2).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        pretrained: str | Path | None = None,
        *,
        synthetic: bool = False,
        image_size: int | tuple[int, int] | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=2.5e-6),
        warmup_steps: int = 0,
        ema_decay: float = 0.9999,
        caption_dropout: float = 0.1,
        cache_latents: str = "none",
        cache_text: str = "none",
        gradient_checkpointing: bool = False,
        sample_prompts: Sequence[str] | Literal["train"] | None = None,
        guidance_scale: float = 7.5,
    ) -> None:
        super().__init__()
        check_arguments(lora_rank, warmup_steps, ema_decay, caption_dropout)
        pipeline = open_pipeline(pretrained, synthetic=synthetic, image_size=image_size)
        self.unet = pipeline.unet.train()  # which comes in evaluation mode, and Lightning leaves modes alone
        self.latents = LatentEncoder(pipeline.vae, cache=cache_latents)
        self.captions = CaptionEncoder(pipeline, cache=cache_text)
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        self.image_shape = check_size(image_size, unet=self.unet, scale=self.latents.scale)
        self.unet.requires_grad_(True)
        if lora_rank is not None:
            add_lora(self.unet, rank=lora_rank, alpha=lora_alpha, targets=lora_targets)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.ema = TrainedAverage(self.unet, decay=ema_decay) if ema_decay else None
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.caption_dropout = caption_dropout
        self.sample_prompts = sample_prompts
        self.guidance_scale = guidance_scale
        self.loss_reducer: Callable[[Tensor, Tensor], Tensor] = mean_loss
        self._pipeline = pipeline
        if self.latents.cache is not None:
            # Only then: Lightning warns of this hook wherever there is a data module.
            self.on_before_batch_transfer = self._look_up  # type: ignore[method-assign]
            warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer` in `LightningModule`.*")
        self._remember(
            pretrained=None if pretrained is None else str(pretrained),
            synthetic=synthetic,
            image_size=list(self.image_shape[1:]),
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_targets=list(lora_targets),
            warmup_steps=warmup_steps,
            ema_decay=ema_decay,
            caption_dropout=caption_dropout,
            sample_prompts=sample_prompts if isinstance(sample_prompts, str | None) else list(sample_prompts),
            guidance_scale=guidance_scale,
        )

    # --- training --------------------------------------------------------------------------------------------------

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Conditions, *, use_ema: bool = False) -> Tensor:
        """Predict from noisy latents.

        Args:
            latents: Noisy latents, shape ``(B, c, h, w)``.
            timesteps: 0 … T - 1, shape ``(B,)`` or ``()``.
            conditions: What ``self.captions`` makes of captions.
            use_ema: Whether the averaged weights predict (if any are kept).

        Returns:
            The prediction, shape ``(B, c, h, w)``.
        """
        height, width = (side * self.latents.scale for side in latents.shape[-2:])
        arguments = conditions.arguments(height, width) | {"return_dict": False}
        if use_ema and self.ema is not None:
            return self.ema.call(self.unet, latents, timesteps, **arguments)[0]
        return self.unet(latents, timesteps, **arguments)[0]

    def losses(
        self, latents: Tensor, timesteps: Tensor, noise: Tensor, conditions: Conditions, *, use_ema: bool = False
    ) -> Tensor:
        """Loss of each sample.

        Args:
            latents: What ``self.latents`` makes of images, shape ``(B, c, h, w)``.
            timesteps: 0 … T - 1, shape ``(B,)``.
            noise: Gaussian noise, shape ``(B, c, h, w)``.
            conditions: What ``self.captions`` makes of captions.
            use_ema: Whether the averaged weights predict.

        Returns:
            Shape ``(B,)``.
        """
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = prediction_target(
            latents, noise, timesteps, self.scheduler.alphas_cumprod, self.scheduler.config.prediction_type
        )
        return sample_losses(self(noisy, timesteps, conditions, use_ema=use_ema), target)

    def _look_up(self, batch: Any, dataloader_idx: int) -> Any:
        """Exchange training images that have been encoded before for what was kept of them."""
        if not self.training:
            return batch
        check_captioned(batch)
        images, captions, *others = batch
        return [self.latents.look_up(images, *others[:1]), captions, *others]

    def training_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """One step; returns ``loss`` with the losses and timesteps of its samples."""
        check_captioned(batch)
        latents, conditions = self.latents(batch[0]), self.captions(batch[1], keep=self.training)
        if self.caption_dropout:
            dropped = torch.rand(len(latents), device=latents.device) < self.caption_dropout
            conditions = conditions.replaced(dropped, self.captions.null())
        timesteps = torch.randint(self.num_timesteps, (len(latents),), device=latents.device)
        losses = self.losses(latents, timesteps, torch.randn_like(latents), conditions)
        loss = self.loss_reducer(losses, timesteps)
        average = losses.detach().mean()
        self.log("train/loss", average, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(latents))
        return {"loss": loss, "sample_loss": losses, "timesteps": timesteps}

    def validation_step(self, batch: Any, batch_idx: int = 0) -> None:
        """Loss on held-out images, always with the same noise and no caption left out, so that epochs compare."""
        self._held_out_loss("val/loss", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int = 0) -> None:
        """The same on the test images."""
        self._held_out_loss("test/loss", batch, batch_idx)

    def _held_out_loss(self, name: str, batch: Any, batch_idx: int) -> None:
        check_captioned(batch)
        generator = torch.Generator().manual_seed(batch_idx)
        latents = self.latents(batch[0], at_mean=True)
        timesteps = torch.randint(self.num_timesteps, (len(latents),), generator=generator).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        loss = self.losses(latents, timesteps, noise, self.captions(batch[1]), use_ema=True).mean()
        self.log(name, loss, prog_bar=True, batch_size=len(latents), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Optimizer over what is trained, and the warm-up."""
        optimizer = self.optimizer(self._trained())
        if not self.warmup_steps:
            return optimizer
        # LinearLR starts at a factor > 0: step 1 of n has 1/n of the rate.
        warmup = LinearLR(optimizer, start_factor=1 / self.warmup_steps, total_iters=self.warmup_steps - 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    def on_fit_start(self) -> None:
        """List what is averaged once: walking through a model takes as long as averaging it."""
        self._averaged = self._trained()
        self.captions.null()  # now: a training step in evaluation mode is to change nothing
        # Of which Lightning warns; it is what frozen networks are meant to be in.
        warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training.*")

    def on_fit_end(self) -> None:
        """Let go of the list."""
        self.__dict__.pop("_averaged", None)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then move the average: together, so that nothing sees one without the other."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None:
            self.ema.update(self._averaged)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, **kwargs: Any) -> "TextToImageModule":  # type: ignore[override]
        """Load a module as its checkpoint specifies it; ``pretrained=`` says where the pipeline has moved to."""
        arguments = arguments_of(checkpoint_path) | kwargs
        return super().load_from_checkpoint(checkpoint_path, map_location, weights_only=True, **arguments)
